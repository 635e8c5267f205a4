"""Charts for notebooks: interactive by plotly (extra ``foregate[notebook]``), with the matplotlib picture beside it.

A notebook front end that knows plotly (JupyterLab, Notebook 7, VS Code) shows the first, everything else the second: so
a stored notebook stays small, needs no network, and can be read where nothing runs.
"""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from foregate.analysis.chart import Chart, Heat, Lines, Matrices
from foregate.analysis.figures import draw
from foregate.analysis.palette import CIVIDIS, LIGHT

PLOTLY = "application/vnd.plotly.v1+json"
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")
PICTURE_DPI = 80
COLOURS = 48
"""Of the picture beside it: 10 kB or so, a third of what full colour takes."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What a notebook displays for ``chart``."""

    chart: Chart

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        found: dict[str, Any] = {PLOTLY: figure(self.chart), "text/plain": self.chart.title}
        with TemporaryDirectory() as directory:
            names = draw(flat(self.chart), Path(directory), kinds=("png",), dpi=PICTURE_DPI)
            found["image/png"] = b64encode(_small(Path(directory) / names[0])).decode()
        return found


def figure(chart: Chart) -> dict[str, Any]:
    """The chart as plotly's JSON: curves with their intervals, matrices with a read-out of every cell."""
    import plotly.graph_objects as go

    made = go.Figure(layout=_layout(chart))
    if isinstance(chart, Lines):
        for number, series in enumerate(chart.series):
            made.add_traces(_curve(series, number))
    elif isinstance(chart, Heat):
        made.add_trace(go.Heatmap(**_cells(chart, chart.values, chart.value_label)))
    else:
        _pages(made, chart)
    return dict(json.loads(made.to_json()))


def _layout(chart: Chart) -> dict[str, Any]:
    square = not isinstance(chart, Lines)
    layout: dict[str, Any] = {"title": {"text": chart.title}, "template": "none", "height": 520 if square else 420}
    layout["xaxis"] = {"title": {"text": chart.x_label}}
    layout["yaxis"] = {"title": {"text": chart.y_label}, "autorange": "reversed" if square else True}
    if isinstance(chart, Lines):
        layout["yaxis"] = layout["yaxis"] | {"rangemode": "tozero"}
        if chart.log:
            layout["xaxis"] |= {"type": "log", "dtick": float(np.log10(2))}
    return layout


def _curve(series: Any, number: int) -> list[dict[str, Any]]:
    color = LIGHT[number % len(LIGHT)]
    line = {"color": color, "dash": "dash" if series.dashed else "solid"}
    marker = {"symbol": SYMBOLS[number % len(SYMBOLS)], "color": color}
    group = {"x": _array(series.x), "legendgroup": series.name, "type": "scatter"}
    drawn = [group | {"y": _array(series.y), "name": series.name, "line": line, "marker": marker}]
    if series.low is not None and series.high is not None:
        edge = group | {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        below = edge | {"y": _array(series.low)}
        above = edge | {"y": _array(series.high), "fill": "tonexty", "fillcolor": _faint(color)}
        drawn = [below, above, *drawn]
    return drawn


def _cells(chart: Any, values: Any, label: str) -> dict[str, Any]:
    scale = [[n / (len(CIVIDIS) - 1), color] for n, color in enumerate(CIVIDIS)]
    names = {"x": getattr(chart, "columns", None), "y": getattr(chart, "rows", None)}
    hover = f"{chart.y_label} %{{y}}, {chart.x_label} %{{x}}: %{{z:.4g}}<extra></extra>"
    cells = {"z": np.asarray(values, np.float32), "colorscale": scale, "colorbar": {"title": {"text": label}}}
    return cells | {"hovertemplate": hover} | {key: name for key, name in names.items() if name is not None}


def _pages(made: Any, chart: Matrices) -> None:
    """One matrix at a time, of neighbouring layers, chosen from a list: all pairs would be megabytes."""
    import plotly.graph_objects as go

    pairs = _neighbours(chart)
    for number, key in enumerate(pairs):
        made.add_trace(go.Heatmap(**_cells(chart, unpacked(chart, key), "P(b | a)"), visible=number == 0))
    buttons = [
        {
            "label": f"layer {key.replace(',', ' → ')}",
            "method": "update",
            "args": [{"visible": [other == key for other in pairs]}],
        }
        for key in pairs
    ]
    made.update_layout(updatemenus=[{"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.15}])


def unpacked(chart: Matrices, key: str) -> Any:
    """The matrix of "l,m": [E of l, E of m]."""
    width = chart.sizes[int(key.split(",")[1])]
    return (np.frombuffer(chart.cells[key], np.uint8).reshape(-1, width) / 255.0) ** 2


def _neighbours(chart: Matrices) -> list[str]:
    pairs = [key for key in chart.cells if int(key.split(",")[1]) == int(key.split(",")[0]) + 1]
    return sorted(pairs, key=lambda key: int(key.split(",")[0])) or list(chart.cells)[:1]


def flat(chart: Chart) -> Lines | Heat:
    """What the picture shows: of many matrices the first."""
    if not isinstance(chart, Matrices):
        return chart
    key = _neighbours(chart)[0]
    title = f"P(b | a), layer {key.replace(',', ' → ')}"
    return Heat(chart.name, title, chart.x_label, chart.y_label, "P(b | a)", unpacked(chart, key))


def _array(values: Any) -> Any:
    """float32, which plotly packs into a few bytes a number; None becomes NaN, a gap."""
    return np.array([np.nan if value is None else value for value in values], np.float32)


def _small(picture: Path) -> bytes:
    from PIL import Image  # matplotlib needs it anyway

    held = BytesIO()
    with Image.open(picture) as opened:
        opened.convert("RGB").quantize(COLOURS).save(held, "PNG", optimize=True)
    return held.getvalue()


def _faint(color: str) -> str:
    red, green, blue = (int(color[n : n + 2], 16) for n in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"
