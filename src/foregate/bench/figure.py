"""TPOT by arm, stacked into what it consists of, beside its bound. By matplotlib (``foregate[analysis]``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foregate.bench.grid import place
from foregate.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = (("compute", "#0072B2"), ("exposed I/O", "#D55E00"), ("other", "#8F6400"), ("rival", "#999999"))
"""Okabe and Ito (2008), as in the figures of ``foregate analyze``."""
FORMATS = ("svg", "png")


def check_figure(out: Path) -> None:
    """Make ``out``. Raises ConfigError where it cannot be made or matplotlib is missing: before the work, not after."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            f"--out {out} draws a figure and needs matplotlib, which is missing: pip install 'foregate[analysis]'"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror}") from error


def parts(arm: Mapping[str, Any]) -> list[float]:
    """Milliseconds of compute, exposed I/O and other (overhead, and work beside reads), which add up to TPOT; all of it
    unknown for a rival."""
    tpot = float(arm["tpot_ms"]["median"])
    if "compute_ms" not in arm:
        return [0.0, 0.0, 0.0, tpot]
    # medians of runs and means of parts need not add up: what is over is other, never below zero
    compute, stall = float(arm["compute_ms"]), float(arm["exposed_io_ms"])
    return [compute, stall, max(0.0, tpot - compute - stall), 0.0]


def draw(cells: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
    """Write ``bench.svg`` and ``bench.png`` into ``out``. Same numbers, same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = sum(len(cell["arms"]) for cell in cells)
    style: dict[Any, Any] = {"svg.hashsalt": "foregate", "svg.fonttype": "none", "font.size": 9.0}
    written = []
    with rc_context(style):
        figure = Figure(figsize=(8.6, 1.2 + 0.24 * rows + 0.7 * len(cells)), layout="constrained")
        heights = [len(cell["arms"]) + 1 for cell in cells]
        for axes, cell in zip(_axes(figure, heights), cells, strict=True):
            _cell(axes, cell)
        figure.legend(*_legend(), loc="outside lower center", ncols=5, fontsize="small", frameon=False)
        for kind in FORMATS:
            written.append(out / f"bench.{kind}")
            figure.savefig(written[-1], dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return written


def _axes(figure: Any, heights: Sequence[int]) -> list[Axes]:
    found = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    return [row[0] for row in found]


def _cell(axes: Axes, cell: Mapping[str, Any]) -> None:
    names = list(cell["arms"])
    for row, name in enumerate(names):
        arm, left = cell["arms"][name], 0.0
        for value, (_, color) in zip(parts(arm), PARTS, strict=True):
            axes.barh(row, value, left=left, color=color, height=0.72)
            left += value
        low, high = arm["tpot_ms"]["min"], arm["tpot_ms"]["max"]
        axes.plot([low, high], [row, row], color="black", linewidth=0.8)
        if arm.get("bound_ms"):
            axes.plot([arm["bound_ms"]] * 2, [row - 0.45, row + 0.45], color="black", linewidth=2.0)
        axes.text(max(left, high), row, f" {arm['tpot_ms']['median']:.0f}", va="center", fontsize="x-small")
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("ms per token")
    axes.set_title(place(cell), loc="left", fontsize=9)


def _legend() -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=color) for _, color in PARTS]
    handles.append(Line2D([], [], color="black", linewidth=2.0))
    return handles, [name for name, _ in PARTS] + ["bound: max(C, D)"]
