"""``foregate evaluate``: every predictor on the same held-out prompts of recorded traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from foregate.cli.output import console, print_json, result

if TYPE_CHECKING:
    from foregate.evaluation.candidates import Candidate
    from foregate.evaluation.settings import Settings

_BUDGET = "10%,25%,50%"


def evaluate(
    trace: Annotated[
        list[Path], typer.Option(help="A trace with features (foregate trace), or: sample; may be given again.")
    ],
    predictor: Annotated[
        list[str] | None,
        typer.Option(help="Name or file, @N for a lookahead, A+B for several under one allowance; may be given again."),
    ] = None,
    predictors_dir: Annotated[Path | None, typer.Option(help="Every predictor file in this directory.")] = None,
    all_free: Annotated[
        bool, typer.Option("--all", help="Every registered method that needs no training, strangers' included.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Where the traced model lies, for its routers; as the trace says if not given.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Shares of all experts that the simulated cache holds.")] = _BUDGET,
    policies: Annotated[str, typer.Option(help="Cache policies that are simulated.")] = "lru,lfru,echo,belady",
    lookahead: Annotated[
        int | None, typer.Option(help="Layers that predictors look ahead; each one's own if not given.", min=0)
    ] = None,
    reads: Annotated[
        int | None, typer.Option(help="Speculative reads for one layer of one token; k if not given.", min=1)
    ] = None,
    tokens: Annotated[int, typer.Option(help="Held-out decode tokens that are scored at most.", min=1)] = 10_000,
    sim_tokens: Annotated[int, typer.Option(help="Of them, simulated in time.", min=1)] = 800,
    bandwidth: Annotated[float, typer.Option(help="Of the simulated link, GB/s.")] = 3.0,
    expert_mb: Annotated[float, typer.Option(help="Bytes of a simulated expert, MB.")] = 9.437184,
    layer_ms: Annotated[float, typer.Option(help="Simulated layer, ms; a third is before its routing.")] = 6.3,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.", min=0)] = 0,
    jobs: Annotated[int, typer.Option(help="Processes; each holds the traces' test prompts.", min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="Directory for result.json, table.md and figures.")] = None,
    no_figures: Annotated[bool, typer.Option("--no-figures", help="No SVG and PNG: needs no matplotlib.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON object on stdout.")] = False,
) -> None:
    """Accuracy, recall on misses, and simulated time of predictors, on prompts that none was trained on."""
    from foregate.evaluation.candidates import candidates, trainable_free
    from foregate.evaluation.output import check_out, write
    from foregate.evaluation.settings import Settings, parse_budgets
    from foregate.sim.device import Device
    from foregate.trace.sample import locate

    if out is not None:
        check_out(out, figures=not no_figures)
    seconds = layer_ms / 1e3
    settings = Settings(
        traces=tuple(locate(one) for one in trace),
        model=model,
        residencies=parse_budgets(budget),
        policies=tuple(name.strip() for name in policies.split(",")),
        lookahead=lookahead,
        reads=reads,
        tokens=tokens,
        sim_tokens=sim_tokens,
        device=Device(bandwidth * 1e9, round(expert_mb * 1e6), seconds / 3, 2 * seconds / 3),
        seed=seed,
    )
    chosen = candidates([*(predictor or []), *(trainable_free() if all_free else [])], predictors_dir)
    found = _judged(settings, chosen, jobs)
    if out is not None:
        write(found, out, figures=not no_figures)
    _show(found, as_json)


def _judged(settings: Settings, chosen: Sequence[Candidate], jobs: int) -> dict[str, Any]:
    # Seconds of imports: what was asked for has been found to exist before them.
    from foregate.evaluation.judge import Bench
    from foregate.evaluation.result import result as assemble
    from foregate.evaluation.run import judge_all

    with _bar(len(chosen)) as advance:
        bench = Bench(settings)
        judged, left_out = judge_all(bench, chosen, jobs, advance)
        return assemble(bench, judged, left_out)


def _show(found: dict[str, Any], as_json: bool) -> None:
    from foregate.evaluation.provenance import training_lines
    from foregate.evaluation.table import terminal

    about, training, notes = found["about"], training_lines(found), console()
    for name, why in about["left_out"].items():
        notes.print(f"left out: {name}: {why}", markup=False, soft_wrap=True)
    if as_json:
        for line in training:
            if line.startswith("warning"):
                notes.print(line, markup=False, soft_wrap=True)
        print_json(found)
        return
    shown = result()
    for table in terminal(found, shown.width):
        shown.print(table)
    lines = [f"control {line}" for line in about["controls"]] + [f"held out: {about['held_out']}"]
    lines += [f"cache policy echo: it sees {about['echo_sees']}"] if about["echo_sees"] else []
    for line in [*lines, *training]:
        shown.print(line, markup=False, soft_wrap=True)


@contextmanager
def _bar(total: int) -> Iterator[_Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    output = console()
    with Progress(
        *columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=output,
        disable=not output.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        yield _Advance(progress, total)


class _Advance:
    """Called with the name of every predictor that has been judged."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("reading traces", total=total)

    def __call__(self, name: str) -> None:
        self._progress.update(self._task, advance=1, description=name)
