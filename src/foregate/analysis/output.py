"""Writes a study: tables/, figures/, summary.json and report.html."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from foregate.analysis.figures import check_matplotlib, draw
from foregate.analysis.report import report
from foregate.analysis.study import Study
from foregate.errors import ConfigError

FORMAT = "foregate-analysis/1"


def check_out(out: Path, *, figures: bool) -> None:
    """Raises ConfigError, before any work, where the output could not be written."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; an analysis is a directory")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give another directory")
    if figures:
        check_matplotlib()


def write(study: Study, out: Path, *, figures: bool = True) -> dict[str, Any]:
    """Write everything below ``out``; returns the summary, which is also summary.json. It is written last."""
    check_out(out, figures=figures)
    tables = out / "tables"
    tables.mkdir(parents=True)
    written = [found.write(tables) for section in study.sections for found in section.tables]
    drawn: list[str] = []
    if figures:
        pictures = out / "figures"
        pictures.mkdir()
        drawn = [name for section in study.sections for chart in section.charts for name in draw(chart, pictures)]
    summary = summarise(study, written, drawn)
    (out / "report.html").write_text(report(study, summary), encoding="utf-8")
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    return summary


def summarise(study: Study, tables: list[dict[str, Any]], figures: list[str]) -> dict[str, Any]:
    """Everything that is a number and short, with its arm. JSON takes it: what is not finite is null."""
    sections = {
        section.name: {
            "title": section.title,
            "arm": section.arm,
            "method": section.method,
            "findings": section.findings,
            "notes": section.notes,
            "numbers": section.summary,
        }
        for section in study.sections
    }
    plain = {"format": FORMAT, "facts": study.facts, "sections": sections, "tables": tables, "figures": figures}
    found = to_json(plain)
    assert isinstance(found, dict)
    return found


def to_json(value: Any) -> Any:
    """Plain Python values, keys as text, None for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
