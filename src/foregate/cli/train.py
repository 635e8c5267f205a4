"""``foregate train``: a predictor file out of routing traces, for one method or for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from foregate.cli.output import console, print_json, result
from foregate.errors import ConfigError
from foregate.training import TRAINERS

if TYPE_CHECKING:
    from foregate.training.fleet import Job, Outcome
    from foregate.training.standing import Standing

_SHOWN = ("recall_at_k", "recall_on_misses", "misses_at_equal_bytes", "top1", "exact_set", "next_token")


def train(
    trace: Annotated[
        list[Path], typer.Option(help="A trace (foregate trace), or: sample; give several to train on all.")
    ],
    out: Annotated[Path, typer.Option(help="The new file, NAME.safetensors; with --all a directory.")],
    predictor: Annotated[str | None, typer.Option(help=f"One of: {', '.join(TRAINERS.names)}.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Train every method, each in a process of its own.")] = False,
    jobs: Annotated[int, typer.Option(help="With --all: how many at a time.", min=1)] = 1,
    only: Annotated[str, typer.Option(help="With --all: these methods alone, A,B,C.")] = "",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the method, key=value; with --all NAME:key=value.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the traced model lies, for methods that run it; its name if not given.")
    ] = None,
    lookahead: Annotated[int | None, typer.Option(help="Layers ahead; the method's own if not given.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training prompts at most.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and dropout.")] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads; all cores if not given.", min=1)] = None,
    figure: Annotated[bool, typer.Option("--figure", help="Draw the loss curve beside the file (SVG).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Train a predictor. Stops early by validation prompts; after a kill the same command continues."""
    if every == (predictor is not None):
        raise ConfigError("give either --predictor NAME or --all")
    from foregate.trace.sample import locate

    trace = [locate(one) for one in trace]
    flags = {"lookahead": lookahead, "epochs": epochs, "seed": seed}
    if every:
        given = [name for name, value in {**flags, "figure": figure or None}.items() if value is not None]
        if given:
            raise ConfigError(f"--{given[0]} is for one method; with --all give --set NAME:{given[0]}=VALUE")
        from foregate.training.fleet import jobs as find

        todo = find([name.strip() for name in only.split(",") if name.strip()], options or [], model)
        _train_all(todo, trace, out, jobs, threads, as_json)
        return
    if jobs != 1 or only:
        raise ConfigError(f"{'--jobs' if jobs != 1 else '--only'} needs --all")
    from foregate.training.run import Request, merge_options
    from foregate.training.run import train as run

    request = Request(predictor or "", tuple(trace), out, merge_options(options or [], **flags, model=model), threads)
    with _bar() as bar:
        artifact = run(request, bar)
    drawn = _draw(request.curve, out) if figure else None
    if as_json:
        print_json({"out": str(out), "curve": str(request.curve), "figure": drawn, **artifact.as_dict()})
        return
    result().print(f"{out}: {artifact.method}, lookahead {artifact.lookahead}", soft_wrap=True)
    for name in _SHOWN:
        if artifact.metrics.get(name) is not None:
            result().print(f"  {name.replace('_', ' ')}: {artifact.metrics[name]:.4f} (validation prompts)")


def _train_all(
    todo: Sequence[Job], traces: list[Path], out: Path, count: int, threads: int | None, as_json: bool
) -> None:
    from foregate.training.fleet import train_all

    with _fleet(len(todo)) as bar:
        outcomes = train_all(todo, traces, out, count, threads, bar)
    failed = [outcome for outcome in outcomes if outcome.error]
    if as_json:
        print_json({"out": str(out), "trained": [vars(outcome) for outcome in outcomes]})
    else:
        result().print(_table(outcomes))
    if failed:
        names = ", ".join(outcome.name for outcome in failed)
        console().print(f"{len(failed)} of {len(outcomes)} failed: {names}; the same command tries them again")
        raise typer.Exit(1)


def _draw(curve: Path, out: Path) -> str | None:
    from foregate.training.curve import draw

    path = out.with_suffix(".curve.svg")
    return str(path) if draw(curve, path, out.stem) else None


class _Bar:
    """One training on a progress bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("opening", total=None)

    def begin(self, stage: str, total: int | None) -> None:
        self._progress.reset(self._task, description=stage, total=total)

    def advance(self, units: int = 1) -> None:
        self._progress.advance(self._task, units)

    def tell(self, line: str) -> None:
        self._progress.console.print(line, soft_wrap=True)


@contextmanager
def _bar() -> Iterator[_Bar]:
    with _progress(TextColumn("{task.completed:,.0f}")) as progress:
        yield _Bar(progress)


class _Fleet:
    """A bar for the whole, and one for every method that is being trained; those that end, at once and for good."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._whole = progress.add_task("methods trained", total=total)
        self._running: dict[str, TaskID] = {}

    def started(self, job: Job) -> None:
        self._running[job.name] = self._progress.add_task(f"{job.name}: reading traces", total=None)

    def stands(self, job: Job, at: Standing) -> None:
        facts = [at.stage]
        facts += [f"epoch {at.epoch}"] if at.epoch is not None else []
        facts += [f"loss {at.loss:.4g}"] if at.loss is not None else []
        facts += [f"recall at k {at.recall_at_k:.3f}"] if at.recall_at_k is not None else []
        told = f"{job.name}: {', '.join(facts)}"
        self._progress.update(self._running[job.name], description=told, completed=at.done, total=at.total)

    def ended(self, outcome: Outcome) -> None:
        self._progress.remove_task(self._running.pop(outcome.name))
        self._progress.console.print(_told(outcome), soft_wrap=True, markup=False)
        self._progress.advance(self._whole)


def _told(outcome: Outcome) -> str:
    metrics = outcome.metrics or {}
    shown = [f"{name.replace('_', ' ')} {metrics[name]:.3f}" for name in _SHOWN if metrics.get(name) is not None]
    told = f"failed: {outcome.error}" if outcome.error else ", ".join(shown) or "done"
    return f"{outcome.name}: {told} ({outcome.seconds:.0f} s)"


@contextmanager
def _fleet(total: int) -> Iterator[_Fleet]:
    with _progress() as progress:
        yield _Fleet(progress, total)


def _progress(*extra: TextColumn) -> Progress:
    columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), *extra, TimeElapsedColumn())
    output = console()
    return Progress(
        *columns,
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=output,
        disable=not output.is_terminal,
        transient=True,
    )


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(title="trained (rates over validation prompts)", title_justify="left")
    for column in ("name", *(name.replace("_", " ") for name in _SHOWN), "seconds"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for outcome in outcomes:
        values = [(outcome.metrics or {}).get(name) for name in _SHOWN]
        shown = [f"{value:.3f}" if isinstance(value, float) else "" for value in values]
        if outcome.error:
            shown[0] = "failed"
        table.add_row(outcome.name, *shown, f"{outcome.seconds:.0f}")
    return table
