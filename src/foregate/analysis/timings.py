"""Where the time of a layer goes, if the trace was recorded with timings; the published 47-59 % claim checked."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from foregate.analysis.chart import Lines, Series, numbers
from foregate.analysis.prompt import Prompt, Shape
from foregate.analysis.section import Section
from foregate.analysis.settings import Settings
from foregate.analysis.table import records

CLAIM = (0.47, 0.59)
PHASES = ("prefill", "decode")
PARTS = ("attention", "routing", "dispatch", "compute", "wait")
COLUMNS = ("phase", "layer", "part", "seconds", "share", "passes")
METHOD = (
    "Sums over passes, by the phase of the pass. Layer time is attention + routing (the router) + dispatch (from its "
    "end to the call of the experts) + experts; experts are split into the wait for weights and the rest (compute). "
    "Only what was measured is in the sum. The published claim (routing and dispatch take 47-59 % of layer time) is "
    "for MoE distributed over devices, where dispatch is communication; on one device there is none."
)


class Timings:
    """Nanoseconds and measured passes by phase, part and layer."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.shape = shape
        self._sums: dict[tuple[int, str], Any] = defaultdict(lambda: np.zeros(shape.layers))
        self._passes: dict[tuple[int, str], Any] = defaultdict(lambda: np.zeros(shape.layers, np.int64))

    def add(self, prompt: Prompt) -> None:
        for name, values in prompt.timings.items():
            for phase in range(2):
                measured = (values >= 0) & (prompt.decode[:, None] == bool(phase))
                if measured.any():
                    self._sums[phase, name] += np.where(measured, values, 0).sum(axis=0)
                    self._passes[phase, name] += measured.sum(axis=0)

    def finish(self) -> Section:
        section = Section("timing", "Time of a layer", "as measured while tracing; phase with every number", METHOD)
        if not self._sums:
            section.notes.append("The trace has no timings (foregate trace --timings): no breakdown.")
            return section
        rows = [row for phase in range(2) for row in self._rows(phase)]
        section.tables.append(records("timing", "Seconds of each part of a layer, summed over passes", rows, COLUMNS))
        for phase in PHASES:
            mine = [row for row in rows if row["phase"] == phase]
            if mine:
                section.summary[phase] = summary = _summary(mine)
                section.findings.append(_finding(phase, summary))
                section.charts.append(_chart(phase, mine, self.shape.layers))
        return section

    def _rows(self, phase: int) -> list[dict[str, Any]]:
        parts = {part: self._part(phase, part) for part in PARTS}
        total = np.sum([seconds for seconds, _ in parts.values()], axis=0)
        rows = []
        for part, (seconds, passes) in parts.items():
            for layer in np.flatnonzero(passes):
                share = float(seconds[layer] / total[layer]) if total[layer] else None
                values = (PHASES[phase], int(layer), part, float(seconds[layer]), share, int(passes[layer]))
                rows.append(dict(zip(COLUMNS, values, strict=True)))
        return rows

    def _part(self, phase: int, part: str) -> tuple[Any, Any]:
        if part == "wait":
            return self._sums[phase, "expert_wait_ns"] / 1e9, self._passes[phase, "expert_wait_ns"]
        if part == "compute":
            compute = self._sums[phase, "experts_ns"] - self._sums[phase, "expert_wait_ns"]
            return np.maximum(0, compute) / 1e9, self._passes[phase, "experts_ns"]
        return self._sums[phase, f"{part}_ns"] / 1e9, self._passes[phase, f"{part}_ns"]


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = {part: sum(row["seconds"] for row in rows if row["part"] == part) for part in PARTS}
    measured = [part for part in PARTS if any(row["part"] == part for row in rows)]
    total = sum(seconds.values())
    out: dict[str, Any] = {"seconds": {part: seconds[part] for part in measured}, "measured": measured}
    if {"routing", "dispatch"} <= set(measured) and total:
        share = (seconds["routing"] + seconds["dispatch"]) / total
        out["routing_and_dispatch"] = share
        waited = 0 < seconds["wait"] < total
        out["without_wait"] = share * total / (total - seconds["wait"]) if waited else None
        out["in_published_range"] = CLAIM[0] <= share <= CLAIM[1]
    return out


def _finding(phase: str, summary: dict[str, Any]) -> str:
    if "routing_and_dispatch" not in summary:
        return f"{phase}: routing or dispatch was not measured; measured were {', '.join(summary['measured'])}."
    share = summary["routing_and_dispatch"]
    place = "inside" if summary["in_published_range"] else "below" if share < CLAIM[0] else "above"
    rest = "" if "attention" in summary["measured"] else "; attention was not measured, so the share is an upper bound"
    waits = summary["without_wait"]
    without = "" if waits is None else f" ({waits:.1%} if waits for weights are left out)"
    return (
        f"{phase}: routing and dispatch take {share:.1%} of layer time{without}, {place} the published 47-59 %{rest}."
    )


def _chart(phase: str, rows: list[dict[str, Any]], layers: int) -> Lines:
    series = []
    for part in PARTS:
        by_layer = {row["layer"]: row["share"] for row in rows if row["part"] == part}
        if by_layer:
            series.append(
                Series(part, [float(n) for n in range(layers)], numbers(by_layer.get(n) for n in range(layers)))
            )
    return Lines(f"timing_{phase}", f"Time of a layer, {phase}", "MoE layer", "share of layer time", series)
