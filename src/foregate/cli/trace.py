"""``foregate trace``: record what a model routes, and look at, merge or split what was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer.core import TyperGroup

from foregate.cli.output import console, print_json, size, two_columns
from foregate.cli.run import ChatTemplate
from foregate.cli.trace_setup import HELD_OUT, find_prompts, identity_of, load_traced, run_info
from foregate.config import RunConfig, SamplingConfig
from foregate.datasets.catalogue import NAMES
from foregate.errors import ConfigError

if TYPE_CHECKING:
    from foregate.trace.session import Progress as Done

FRACTIONS = "0.8,0.1,0.1"
_SAMPLING = SamplingConfig()


class DefaultGroup(TyperGroup):
    """A group whose first argument may be a command's name; if it is not, the arguments are those of ``record``.

    A model directory that is called like a command is given as ./info, or after ``record``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["record", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=DefaultGroup,
    no_args_is_help=True,
    subcommand_metavar="MODEL --dataset NAME|FILE --out DIR | COMMAND",
    help="Record the routing of a model: foregate trace MODEL … (short for record MODEL …); look at traces.",
)
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Out = Annotated[Path, typer.Option(help="Directory of the new trace.")]


@app.command()
def record(
    model: Annotated[str, typer.Argument(help="Directory, hub id, pack, or 'reference' (built in).")],
    out: Out,
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}, {HELD_OUT}; a file; or a hub id.")],
    data_dir: Annotated[Path | None, typer.Option(help="Directory with local copies of known data sets.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data set (test).")] = None,
    domain: Annotated[str | None, typer.Option(help="Domain to note for prompts of a file.")] = None,
    limit: Annotated[int | None, typer.Option(help="Trace the first N prompts only.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens after each prompt at most.")] = _SAMPLING.max_new_tokens,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = _SAMPLING.temperature,
    teacher_forced: Annotated[
        bool, typer.Option("--teacher-forced", help="Route the given answers, in one pass, instead of generating.")
    ] = False,
    features: Annotated[str, typer.Option(help="Hidden states to keep: pre_attention,residual,router_input.")] = "",
    feature_dtype: Annotated[
        str, typer.Option(help="float16, bfloat16, or auto: the model's own if 16 bits.")
    ] = "auto",
    scores: Annotated[bool, typer.Option("--scores", help="Keep the router's scores of all experts.")] = False,
    timings: Annotated[bool, typer.Option("--timings", help="Keep the time of each part of each layer.")] = False,
    memory_budget: Annotated[
        str | None, typer.Option("--memory-budget", "--budget", "--ram", help="As in foregate run; auto if not given.")
    ] = None,
    resident: Annotated[bool, typer.Option("--resident", help="Plain transformers, all weights in memory.")] = False,
    threads: Annotated[int | None, typer.Option(help="Compute threads; torch's choice if not given.", min=1)] = None,
    chat_template: Annotated[ChatTemplate, typer.Option(help="Use the model's, if it has one.")] = ChatTemplate.auto,
    seed: Annotated[int, typer.Option(help="Seed of the sampling, and of synthetic prompts.")] = _SAMPLING.seed,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the trace in --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Trace a model over a data set. SIGTERM ends after the current prompt; --resume continues, even after a kill."""
    if resident and memory_budget is not None:
        raise ConfigError(f"--resident holds every expert; it cannot honour --memory-budget {memory_budget}")
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    config = RunConfig(
        model=model, memory_budget=memory_budget or "auto", predictor="none", prefetch="off", threads=threads
    )
    names = tuple(name.strip() for name in features.split(",") if name.strip())
    from foregate.trace.writer import check_out

    check_out(out, resume=resume)
    data = find_prompts(dataset, data_dir, split, domain, seed)
    if teacher_forced and not any(prompt.reference for prompt in data.prompts):
        raise ConfigError(f"data set {dataset!r} gives no answers; --teacher-forced has nothing to route")
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "teacher_forced": teacher_forced,
        "chat_template": chat_template.value,
        "memory_budget": None if resident else config.memory_budget,
    }
    from foregate.trace.session import Task, run_session, sigterm_noted
    from foregate.trace.tracker import RouterTracker, check_features
    from foregate.trace.writer import TraceWriter

    check_features(names, feature_dtype)
    prompts = data.prompts[:limit]
    with (
        sigterm_noted() as stop,
        TraceWriter(out, resume=resume) as writer,
        load_traced(config, resident, chat_template) as it,
    ):
        run = run_info("resident" if resident else "engine", data, settings, seed)
        identity = identity_of(it.tracked, config.model)
        writer.check_same(identity["fingerprint"], run)
        with (
            RouterTracker(
                it.tracked, features=names, scores=scores, timings=timings, feature_dtype=feature_dtype
            ) as tracker,
            _bar(len(prompts), len(writer.done)) as on_done,
        ):
            done = run_session(
                it,
                tracker,
                prompts,
                writer,
                Task(sampling, teacher_forced),
                lambda: tracker.header(run, **identity),
                on_done=on_done,
                stop=stop,
            )
    _report(out, done, as_json)


@app.command()
def info(directory: Annotated[Path, typer.Argument(help="A trace.")], as_json: AsJson = False) -> None:
    """What a trace holds, and whether every byte is as it was written (exit code 1 if not)."""
    from foregate.trace.info import describe

    found = describe(directory)
    if as_json:
        print_json(found)
    else:
        _show(found)
    if found["problems"]:
        raise typer.Exit(1)


@app.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(help="Traces of the same model, with the same columns.")], out: Out
) -> None:
    """Copy several traces into one. A prompt that is in two of them must be the same in both."""
    from foregate.trace.copying import merge as run

    if len(sources) < 2:
        raise ConfigError(f"one trace ({sources[0]}) is nothing to merge; give two or more")
    console().print(f"{run(sources, out)} prompts in {out}", soft_wrap=True)


@app.command()
def split(
    directory: Annotated[Path, typer.Argument(help="A trace.")],
    out: Annotated[Path, typer.Option(help="Directory that gets train, validation and test.")],
    fractions: Annotated[str, typer.Option(help="Of train, validation and test.")] = FRACTIONS,
    seed: Annotated[int, typer.Option(help="Another seed, another split.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Split a trace by prompt, never by row: the same prompt text is always on the same side."""
    from foregate.trace.copying import split as run

    try:
        shares = [float(share) for share in fractions.split(",")]
    except ValueError:
        raise ConfigError(f"fractions {fractions!r} are not numbers like {FRACTIONS}") from None
    found = run(directory, out, shares, seed)
    if as_json:
        print_json(found)
    else:
        console().print(", ".join(f"{name}: {count} prompts" for name, count in found.items()))


@contextmanager
def _bar(total: int, before: int) -> Iterator[Callable[[Done], None]]:
    """A progress bar with ETA on stderr, where that is a terminal."""
    columns = (
        TextColumn("tracing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    output = console()
    with Progress(*columns, console=output, disable=not output.is_terminal) as progress:
        task = progress.add_task("trace", total=total, completed=before, tokens=0)
        yield lambda done: progress.update(task, completed=done.done, tokens=done.tokens)


def _report(out: Path, done: Done, as_json: bool) -> None:
    rest = done.total - done.done
    if as_json:
        values = {name: getattr(done, name) for name in done.__dataclass_fields__}
        print_json({"out": str(out), **values})
        return
    told = f"{done.done} of {done.total} prompts in {out}: {done.tokens:,} tokens in this session"
    skipped = f", {done.skipped} skipped (see foregate trace info)" if done.skipped else ""
    stopped = f"; stopped by SIGTERM, {rest} to go: --resume continues" if done.stopped else ""
    console().print(told + skipped + stopped, soft_wrap=True)


def _show(found: dict[str, Any]) -> None:
    """The description of a trace as a table."""
    experts, top_k = found["experts_per_layer"], found["top_k"]
    rows = [
        ("model", f"{found['model']} ({found['model_type']}, {found['fingerprint']})"),
        ("MoE layers", f"{found['layers']}, {_range(experts)} experts, {_range(top_k)} chosen"),
        ("prompts", f"{found['prompts']:,}, {found['skipped']:,} skipped"),
        ("tokens", f"{found['tokens']:,}, {found['decode_tokens']:,} of them after the prompt"),
        ("rows (tokens x layers)", f"{found['rows']:,}, experts in order of weight in {found['rows_by_weight']:.1%}"),
        ("bytes", size(found["bytes"])),
        *(
            (f"domain {name}", f"{part['prompts']:,} prompts, {part['rows']:,} rows")
            for name, part in found["domains"].items()
        ),
        ("scores", found["scores"] or "none"),
        ("timings", ", ".join(found["timings"]) or "none"),
        ("features", ", ".join(f"{name} ({kind})" for name, kind in found["features"].items()) or "none"),
        ("state", "complete" if found["complete"] else "not finished: every prompt that is there is whole"),
        ("integrity", "every file as it was written" if not found["problems"] else "; ".join(found["problems"])),
    ]
    console().print(two_columns(found["path"], rows))


def _range(counts: list[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
