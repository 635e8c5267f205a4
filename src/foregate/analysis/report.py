"""The report: one HTML file with its style, script and numbers inside, so that it opens offline in any browser.

The charts are drawn by about 300 lines of our own (``page/``). Plotly would add 4.5 MB to every report, and its charts
cannot be walked through with the keyboard. Without scripts the findings, tables and notes are still there.
"""

from __future__ import annotations

import base64
import json
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from foregate.analysis.chart import Chart, Heat, Lines
from foregate.analysis.palette import CIVIDIS, DARK, LIGHT
from foregate.analysis.section import Section
from foregate.analysis.study import Study
from foregate.analysis.table import Table

SCRIPTS = ("draw.js", "lines.js", "heat.js", "matrices.js", "page.js")
SHORT = 40
"""Tables up to this many rows are shown whole."""


def report(study: Study, summary: dict[str, Any]) -> str:
    """The page. ``summary`` says which tables were written."""
    rows = {found["name"]: found["rows"] for found in summary["tables"]}
    charts = {chart.name: chart_data(chart) for section in study.sections for chart in section.charts}
    data = {"charts": charts, "light": LIGHT, "dark": DARK, "cividis": CIVIDIS}
    title = f"Routing of {study.facts['model']}"
    return _asset("page.html").format(
        title=escape(title),
        style=_asset("page.css"),
        script="\n".join(_asset(name) for name in SCRIPTS),
        facts=_facts(summary["facts"]),
        links="".join(f'<a href="#{s.name}">{escape(s.title)}</a>' for s in study.sections),
        sections="\n".join(_section(section, rows) for section in study.sections),
        data=_embedded(data),
    )


def chart_data(chart: Chart) -> dict[str, Any]:
    """What the script draws. Numbers have six significant digits."""
    common = {"title": chart.title, "x": chart.x_label, "y": chart.y_label}
    if isinstance(chart, Lines):
        series = [
            {"name": s.name, "x": _short(s.x), "y": _short(s.y), "dashed": s.dashed}
            | ({"low": _short(s.low), "high": _short(s.high)} if s.low and s.high else {})
            for s in chart.series
        ]
        return common | {"kind": "lines", "log": chart.log, "series": series}
    if isinstance(chart, Heat):
        cells = [_short([None if not np.isfinite(v) else float(v) for v in row]) for row in chart.values]
        names = {"rows": chart.rows, "columns": chart.columns}
        return common | {"kind": "heat", "value": chart.value_label, "cells": cells} | names
    packed = {key: base64.b64encode(cells).decode() for key, cells in chart.cells.items()}
    return common | {"kind": "matrices", "sizes": chart.sizes, "cells": packed}


def _short(values: list[float | None] | list[float]) -> list[float | None]:
    return [None if value is None else float(f"{value:.6g}") for value in values]


def _embedded(data: dict[str, Any]) -> str:
    """JSON that no HTML parser takes for markup."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return files("foregate.analysis").joinpath("page", name).read_text(encoding="utf-8")


def _facts(facts: dict[str, Any]) -> str:
    experts, chosen = sorted(set(facts["experts_per_layer"])), sorted(set(facts["top_k"]))
    phases = ", ".join(f"{count:,} {name}" for name, count in facts["tokens_by_phase"].items())
    rows = [
        ("model", f"{facts['model']} ({facts['model_type']}, {facts['fingerprint']})"),
        ("MoE layers", f"{facts['layers']}, of {_span(experts)} experts, {_span(chosen)} chosen per token"),
        ("prompts", f"{facts['prompts']:,}, {facts['test_prompts']:,} of them for testing only"),
        ("domains", ", ".join(facts["domains"])),
        ("tokens", f"{facts['tokens']:,} ({phases}); arm: {facts['phase']}"),
        ("routing decisions", f"{facts['decisions']:,} (tokens x MoE layers)"),
        ("traces", ", ".join(facts["traces"]) + ("" if facts["complete"] else " (not finished)")),
        ("seed, permutations", f"{facts['seed']}, {facts['permutations']:,}"),
    ]
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows)


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _section(section: Section, rows: dict[str, int]) -> str:
    parts = [f'<section id="{section.name}"><h2>{escape(section.title)}</h2>']
    parts.append(f'<p class="arm"><b>Arm</b> {escape(section.arm)}</p>')
    parts.append(_list("findings", section.findings))
    parts.append(_list("notes", [f"Not computed or limited: {note}" for note in section.notes]))
    parts += [f'<figure class="chart" data-chart="{escape(chart.name)}"></figure>' for chart in section.charts]
    parts += [_table(found, rows[found.name]) for found in section.tables]
    parts.append(f"<details><summary>How it is computed</summary><p>{escape(section.method)}</p></details></section>")
    return "\n".join(parts)


def _list(kind: str, items: list[str]) -> str:
    return f'<ul class="{kind}">' + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>" if items else ""


def _table(found: Table, rows: int) -> str:
    where = f"tables/{found.name}.parquet, {rows:,} rows"
    if rows > SHORT:
        return f"<p class='file'>{escape(found.description)}: {escape(where)}</p>"
    held = found.whole()
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in held.column_names)
    body = "".join("<tr>" + "".join(_cell(value) for value in row.values()) + "</tr>" for row in held.to_pylist())
    return (
        f"<details><summary>{escape(found.description)} ({escape(where)})</summary><div class='scroll'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"<td class='n'>{value:.5g}</td>"
    return (
        f"<td class='n'>{value:,}</td>"
        if type(value) is int
        else f"<td>{escape('' if value is None else str(value))}</td>"
    )
