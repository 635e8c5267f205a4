"""``foregate quality``: what quantising costs, as loss and accuracy on held-out texts and as choices that change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foregate.cli.output import console, print_json, result
from foregate.cli.run import lossy_line
from foregate.cli.trace_setup import HELD_OUT, find_prompts
from foregate.config import LOSSY_MODES, RunConfig
from foregate.errors import ConfigError
from foregate.predictors import choice

if TYPE_CHECKING:
    from rich.table import Table

    from foregate.engine.quality import DomainQuality, Score, Text

_RUN = RunConfig()


def quality(
    model: Annotated[str, typer.Argument(help="Directory, hub id, pack, or 'reference'.")],
    data: Annotated[list[str], typer.Option(help=f"Known data set, {HELD_OUT}, a file, or a hub id; may be repeated.")],
    against: Annotated[str | None, typer.Option(help="The model to compare with: usually the original.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Directory with local copies of known data sets.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data sets (test).")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to predict in each domain, at most.", min=1)] = 4000,
    length: Annotated[int, typer.Option(help="Tokens of a text at most.", min=2)] = 256,
    memory_budget: Annotated[
        str, typer.Option("--memory-budget", "--budget", "--ram", help="Of expert bytes, as in foregate run.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="Compute threads; torch's choice if not given.", min=1)] = None,
    lossy: Annotated[
        str | None, typer.Option(help=f"Against the exact run, token by token: {', '.join(LOSSY_MODES)}.")
    ] = None,
    predictor: Annotated[str | None, typer.Option(help="Of a lossy run: a predictor file or a name.")] = None,
    low_precision_pack: Annotated[str | None, typer.Option(help="Of --lossy low-precision-miss.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Held-out loss and next-token accuracy per domain; against another model: the difference, and equal choices.

    Accuracy: the share of tokens for which the greedy choice is the text's own.

    With --lossy MODE: of that mode against the exact run of the same model, decoded token by token.
    """
    if lossy is not None:
        _check_lossy(lossy, against)
        config = RunConfig(
            model=model,
            memory_budget=memory_budget,
            predictor=choice.check(_RUN.predictor if predictor is None else predictor),
            threads=threads,
            lossy=lossy,
            low_precision_pack=low_precision_pack,
        )
        _lossy(config, [pair for name in data for pair in _prompts(name, data_dir, split)], tokens, length, as_json)
        return
    if predictor is not None or low_precision_pack is not None:
        raise ConfigError(f"--predictor {predictor} and --low-precision-pack {low_precision_pack} need --lossy")
    from foregate.engine.quality import compare

    prompts = [pair for name in data for pair in _prompts(name, data_dir, split)]
    texts: list[Text] = []
    found: dict[str, tuple[list[Score], str]] = {}
    names = [name for name in (against, model) if name is not None]
    for name in names:
        config = RunConfig(model=name, memory_budget=memory_budget, predictor="none", prefetch="off", threads=threads)
        found[name] = _score(config, prompts, texts, tokens, length)
    scores, precision = found[model]
    lines = compare(scores, None if against is None else found[against][0])
    if as_json:
        print_json(
            {
                "model": model,
                "precision": precision,
                "against": against,
                "length": length,
                "domains": [asdict(line) for line in lines],
            }
        )
    else:
        result().print(_table(f"{model} ({precision})", against, lines))


def _check_lossy(lossy: str, against: str | None) -> None:
    if against is not None:
        raise ConfigError(f"--lossy {lossy} is compared with the exact run of the same model; leave --against away")


def _lossy(config: RunConfig, prompts: list[tuple[str, str]], tokens: int, length: int, as_json: bool) -> None:
    from foregate.engine.lossy_quality import lossy_quality

    with _progress(f"{config.model}, {config.lossy}", None) as advance:
        found = lossy_quality(config, prompts, tokens=tokens, length=length, advance=advance)
    if as_json:
        print_json({"model": config.model, "length": length, **found.as_dict()})
        return
    title = f"{config.model}, lossy {found.mode} ({found.predictor}, budget {found.memory_budget})"
    result().print(_table(title, "exact", list(found.domains)))
    result().print(lossy_line(found.deviation))
    speed = f"{found.tpot_s * 1e3:.2f} ms a token, exactly {found.exact_tpot_s * 1e3:.2f} ms"
    result().print(f"{speed}; the first {found.given} tokens of a text are its prompt and not judged")


def _prompts(name: str, data_dir: Path | None, split: str | None) -> list[tuple[str, str]]:
    known = not Path(name).is_file()
    found = find_prompts(name, data_dir if known else None, split if known else None, None, 0)
    return [(prompt.domain, prompt.text + prompt.reference) for prompt in found.prompts]


def _score(
    config: RunConfig, prompts: list[tuple[str, str]], texts: list[Text], tokens: int, length: int
) -> tuple[list[Score], str]:
    """Scores of ``texts``, which the first model's tokenizer fills. Raises ConfigError where the next one's differs."""
    from foregate.engine.engine import Engine
    from foregate.engine.quality import choose_texts, score

    with Engine(config) as engine:
        chosen = choose_texts(
            prompts,
            lambda text: engine.tokenizer(text).input_ids,
            tokens=tokens,
            length=min(length, engine.context),
        )
        if texts and chosen != texts:
            raise ConfigError(f"{config.model} reads the texts as other tokens; only models of one tokenizer compare")
        texts[:] = chosen
        with _progress(config.model, sum(len(text.ids) for text in texts)) as advance:
            scores = []
            for text in texts:
                scores.append(score(engine, text))
                advance(len(text.ids))
        return scores, engine.checkpoint.precision.name


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar of tokens with the time that is left, on stderr; gone when done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen = console()
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _table(title: str, against: str | None, lines: list[DomainQuality]) -> Table:
    from rich.table import Table

    columns = ["domain", "tokens", "loss (nats)", "accuracy"]
    columns += [f"loss of {against}", "difference", f"accuracy of {against}", "same greedy choice"] if against else []
    table = Table(*columns, title=title, title_justify="left")
    for line in lines:
        row: list[Any] = [line.domain, f"{line.tokens:,}", f"{line.loss:.4f}", f"{line.accuracy:.1%}"]
        if line.against is not None:
            spread = "" if line.delta_error is None else f" ± {line.delta_error:.4f}"
            row += [f"{line.against:.4f}", f"{line.delta:+.4f}{spread}"]
            row += [f"{line.accuracy_against:.1%}", f"{line.agreement:.1%}"]
        table.add_row(*row)
    return table
