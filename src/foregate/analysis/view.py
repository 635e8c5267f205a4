"""A study as a notebook shows it: facts, findings, charts with what is seen in them, tables. Needs IPython."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow.compute as pc

from foregate.analysis.captions import captions
from foregate.analysis.interactive import Shown
from foregate.analysis.section import Section
from foregate.analysis.study import Study

SUMMARY = (
    "affinity",
    "top1_by_hop_decode",
    "recall_k_by_hop_decode",
    "recall_k_on_lru_misses_at_25",
    "entropy",
    "path_coverage",
    "overlap",
    "hit_curve_decode",
    "domain_matrix",
    "timing_decode",
)
"""Beginnings of the names of the charts whose sentences make the summary."""


class StudyView:
    """Every method displays something. What a trace does not give is said, with the section's own reason."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.sections = {section.name: section for section in study.sections}
        self.captions = captions(study)

    def facts(self) -> None:
        """What was traced."""
        facts = self.study.facts
        rows = [(key, facts[key]) for key in ("model", "layers", "prompts", "test_prompts", "tokens", "decisions")]
        rows += [("experts a layer", _span(facts["experts_per_layer"])), ("chosen a token", _span(facts["top_k"]))]
        rows += [("domains", ", ".join(facts["domains"])), ("phase", facts["phase"])]
        _markdown(_grid(("fact", "value"), [(key.replace("_", " "), _cell(value)) for key, value in rows]))

    def findings(self, name: str) -> None:
        """The findings of a section, each with its arm, and what could not be computed."""
        section = self.sections[name]
        lines = [f"*Arm: {section.arm}.*", "", *(f"- {text}" for text in section.findings)]
        _markdown("\n".join([*lines, *(f"- Not computed or limited: {text}" for text in section.notes)]))

    def chart(self, section: str, *names: str) -> None:
        """The first of ``names`` that this section has, and under it what is seen."""
        found = {chart.name: chart for chart in self.sections[section].charts}
        name = next((name for name in names if name in found), None)
        if name is None:
            _markdown(_absent(self.sections[section], " or ".join(names)))
            return
        from IPython.display import display

        display(Shown(found[name]))
        if name in self.captions:
            _markdown(f"**Seen:** {self.captions[name]}")

    def table(self, section: str, name: str, columns: Sequence[str], by: str, rows: int = 8, **where: Any) -> None:
        """The ``rows`` rows with the largest ``by`` among those whose columns are as ``where`` says."""
        held = next((table.whole() for table in self.sections[section].tables if table.name == name), None)
        if held is None:
            _markdown(_absent(self.sections[section], f"table {name}"))
            return
        for column, value in where.items():
            held = held.filter(pc.equal(held[column], value))
        best = held.take(pc.sort_indices(held, sort_keys=[(by, "descending")])[:rows])
        _markdown(_grid(columns, [[_cell(row[key]) for key in columns] for row in best.to_pylist()]))

    def summary(self) -> None:
        """What was seen, once more, in one list."""
        told = [text for start in SUMMARY for name, text in self.captions.items() if name.startswith(start)]
        _markdown("\n".join(f"- {text}" for text in told))


def _markdown(text: str) -> None:
    from IPython.display import Markdown, display

    display(Markdown(text))


def _absent(section: Section, what: str) -> str:
    reasons = " ".join(section.notes)
    return f"*{section.title}: this trace gives no {what}.* {reasons}".strip()


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"
