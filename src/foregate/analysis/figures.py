"""Charts as SVG and PNG for papers, by matplotlib (extra ``foregate[analysis]``); same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foregate.analysis.chart import Chart, Heat, Lines, Matrices, Series
from foregate.analysis.palette import HEAT, LIGHT, MARKERS
from foregate.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (5.2, 3.4)
"""Inches: one column and a half of a two-column paper."""
DPI = 150
KINDS = ("svg", "png")


def check_matplotlib() -> None:
    """Raises ConfigError, saying what to install, where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "figures need matplotlib, which is not installed: pip install 'foregate[analysis]', or give --no-figures"
        )


def draw(chart: Chart, directory: Path, *, kinds: Sequence[str] = KINDS, dpi: int = DPI) -> list[str]:
    """Write ``chart`` as .svg and .png; returns the file names, none for what only the report can show."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if isinstance(chart, Matrices):
        return []
    # The salt and the missing date make the files reproducible; "none" keeps text as text in the SVG.
    style: dict[Any, Any] = {"svg.hashsalt": "foregate", "svg.fonttype": "none", "font.size": 9.0}
    with rc_context(style):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(chart.title)
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        if isinstance(chart, Lines):
            _lines(axes, chart)
        else:
            _heat(axes, chart, figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not again for every format
        for kind in kinds:
            where = directory / f"{chart.name}.{kind}"
            figure.savefig(where, dpi=dpi, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return [f"{chart.name}.{kind}" for kind in kinds]


def _lines(axes: Axes, chart: Lines) -> None:
    for number, series in enumerate(chart.series):
        _curve(axes, series, number)
    if chart.log:
        axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    if chart.series:
        axes.legend(fontsize="small", framealpha=0.8)


def _curve(axes: Axes, series: Series, number: int) -> None:
    color, marker = LIGHT[number % len(LIGHT)], MARKERS[number % len(MARKERS)]
    y = _array(series.y)
    line = "--" if series.dashed else "-"
    axes.plot(series.x, y, line, color=color, marker=marker, markersize=3.5, label=series.name)
    if series.low is not None and series.high is not None:
        axes.fill_between(series.x, _array(series.low), _array(series.high), color=color, alpha=0.18, linewidth=0)


def _heat(axes: Axes, chart: Heat, figure: Any) -> None:
    image = axes.imshow(np.ma.masked_invalid(chart.values), cmap=HEAT, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label=chart.value_label)
    if chart.rows is not None:
        axes.set_yticks(range(len(chart.rows)), chart.rows)
    if chart.columns is not None:
        axes.set_xticks(range(len(chart.columns)), chart.columns)


def _array(values: list[float | None]) -> Any:
    return np.array([np.nan if value is None else value for value in values])
