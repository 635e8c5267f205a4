"""``foregate analyze``: from routing traces to numbers, figures and one report. Needs no model and no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from foregate.analysis.settings import Settings
from foregate.cli.output import console, print_json, result

_DEFAULTS = Settings()


class Phase(str, Enum):
    all = "all"
    prefill = "prefill"
    decode = "decode"


_PHASE = Phase(_DEFAULTS.phase)


def analyze(
    traces: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRACE...",
            help="Traces of one model (foregate trace), or: sample, the one that ships with Foregate.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="New or empty directory for tables, figures and the report.")],
    seed: Annotated[int, typer.Option(help="Of the train/test split and the permutations.", min=0)] = _DEFAULTS.seed,
    permutations: Annotated[int, typer.Option(help="In the comparison of domains.", min=1)] = _DEFAULTS.permutations,
    phase: Annotated[Phase, typer.Option(help="Tokens to analyse.")] = _PHASE,
    max_hop: Annotated[
        int | None, typer.Option(help="Longest hop counted; all if not given. Bounds the memory.", min=1)
    ] = _DEFAULTS.max_hop,
    no_figures: Annotated[bool, typer.Option("--no-figures", help="No SVG and PNG: needs no matplotlib.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The summary as one JSON object on stdout.")] = False,
) -> None:
    """How predictable is the routing? Tables (Parquet, CSV), figures (SVG, PNG), summary.json, report.html."""
    from foregate.analysis.output import check_out, write
    from foregate.analysis.study import analyse
    from foregate.trace.sample import locate

    check_out(out, figures=not no_figures)
    settings = Settings(seed=seed, permutations=permutations, phase=phase.value, max_hop=max_hop)
    with _bar() as progress:
        study = analyse([locate(trace) for trace in traces], settings, progress)
        progress.stage("writing", 0)
        summary = write(study, out, figures=not no_figures)
    if as_json:
        print_json(summary)
    else:
        _show(summary, out)


class _Bar:
    """The stages of an analysis on a progress bar; a stage without a known end pulses."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("opening", total=None)

    def stage(self, name: str, total: int) -> None:
        self._progress.reset(self._task, description=name, total=total or None)

    def advance(self, rows: int) -> None:
        self._progress.advance(self._task, rows)


@contextmanager
def _bar() -> Iterator[_Bar]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}"))
    times = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    output = console()
    with Progress(*columns, *times, console=output, disable=not output.is_terminal, transient=True) as progress:
        yield _Bar(progress)


def _show(summary: dict[str, Any], out: Path) -> None:
    """The findings, each under its section, and where the rest is."""
    shown = result()
    for section in summary["sections"].values():
        shown.print(f"[bold]{section['title']}[/bold] [dim]({section['arm']})[/dim]", soft_wrap=True)
        for line in section["findings"]:
            shown.print(f"  {line}", markup=False, soft_wrap=True)
        for line in section["notes"]:
            shown.print(f"  note: {line}", markup=False, soft_wrap=True)
    console().print(f"{len(summary['tables'])} tables, {len(summary['figures'])} figures; open {out / 'report.html'}")
