"""Temporal locality within a prompt: overlap with earlier tokens, reuse distance, working set.

Shapes: T tokens, L layers, k chosen, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.chart import Lines, Series, numbers
from foregate.analysis.prompt import Prompt, Shape, multi_hot
from foregate.analysis.section import Section
from foregate.analysis.settings import Settings
from foregate.analysis.table import records

LAGS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
WINDOWS = tuple(2**n for n in range(11))
PIECE = 2_048
"""Tokens of a prompt looked at together, so that a long prompt costs no more memory; pieces are kept apart."""
PHASES = ("prefill", "decode")
OVERLAP_COLUMNS = ("phase", "layer", "lag", "overlap", "expected", "uses")
REUSE_COLUMNS = ("phase", "layer", "distance", "uses", "share")
SET_COLUMNS = ("layer", "window", "distinct", "share", "windows")
METHOD = (
    "Within one prompt and one layer. Overlap at lag d: share of the k experts of a token that the token d before "
    "chose too; expected is what independent tokens with the same popularity would give. Reuse distance: tokens since "
    "the expert was last chosen there (1 is the token before). Working set (Denning, 1968): distinct experts of a "
    "layer in a window of w tokens, over E. A token counts for the phase it is in."
)
Array = NDArray[Any]


class Locality:
    """Sums by phase and layer: [2, L, lags], [2, L, distances], [L, windows]."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.shape, self.settings = shape, settings
        layers = shape.layers
        self._same = np.zeros((2, layers, len(LAGS)))
        self._uses = np.zeros((2, layers, len(LAGS)))
        self._distance = np.zeros((2, layers, len(WINDOWS) + 2), np.int64)  # the last two: farther, and never before
        self._distinct = np.zeros((layers, len(WINDOWS)))
        self._windows = np.zeros(len(WINDOWS), np.int64)
        self._chosen = np.zeros((layers, shape.experts))
        self._tokens = np.zeros(2, np.int64)

    def add(self, prompt: Prompt) -> None:
        for begin in range(0, prompt.tokens, PIECE):
            piece = slice(begin, begin + PIECE)
            decode = prompt.decode[piece]
            chosen = multi_hot(prompt.experts[piece], self.shape.experts, np.bool_)
            self._tokens += [int((~decode).sum()), int(decode.sum())]
            self._chosen += chosen.sum(axis=0)
            self._overlap(chosen, decode)
            self._reuse(chosen, decode)
            self._working_set(chosen)

    def _overlap(self, chosen: Array, decode: Array) -> None:
        for number, lag in enumerate(LAGS):
            if lag < len(chosen):
                both = (chosen[lag:] & chosen[:-lag]).sum(axis=2)
                for phase in range(2):
                    mine = decode[lag:] == bool(phase)
                    self._same[phase, :, number] += both[mine].sum(axis=0)
                    self._uses[phase, :, number] += mine.sum() * np.array(self.shape.top_k)

    def _reuse(self, chosen: Array, decode: Array) -> None:
        layer, expert, token = np.nonzero(chosen.transpose(1, 2, 0))  # by layer and expert, tokens in order
        key = layer * self.shape.experts + expert
        again = np.r_[False, key[1:] == key[:-1]]
        gap = np.where(again, np.r_[0, np.diff(token)], 0)
        bucket = np.where(again, np.searchsorted(WINDOWS, gap), len(WINDOWS) + 1)
        np.add.at(self._distance, (decode[token].astype(int), layer, bucket), 1)

    def _working_set(self, chosen: Array) -> None:
        """Windows double by joining neighbours, so every window is counted once and none overlaps another."""
        held = chosen
        for number in range(len(WINDOWS)):
            if not len(held):
                return
            self._distinct[:, number] += held.sum(axis=(0, 2))
            self._windows[number] += len(held)
            even = len(held) // 2 * 2
            held = held[0:even:2] | held[1:even:2]

    def finish(self) -> Section:
        section = Section("locality", "Locality in time", "all experts; phase with every number", METHOD)
        overlap, reuse, sets = self._overlap_rows(), self._reuse_rows(), self._working_rows()
        what = "Uses by reuse distance (tokens), by the upper end of the bucket; null is the first use"
        section.tables = [
            records("overlap", "Overlap with earlier tokens", overlap, OVERLAP_COLUMNS),
            records("reuse_distance", what, reuse, REUSE_COLUMNS),
            records("working_set", "Distinct experts of a layer in a window", sets, SET_COLUMNS),
        ]
        section.charts = [self._overlap_chart(overlap), self._reuse_chart(), self._working_chart(sets)]
        section.summary = {"overlap_previous_token": self._previous(overlap)}
        section.findings = [
            _finding(phase, value) for phase, value in section.summary["overlap_previous_token"].items()
        ]
        if not overlap:
            section.notes.append("No prompt has two tokens: no overlap and no reuse.")
        return section

    def _phases(self) -> list[int]:
        return [phase for phase in range(2) if self._tokens[phase]]

    def _overlap_rows(self) -> list[dict[str, Any]]:
        rows = []
        shares = self._chosen / max(1, self._tokens.sum())
        expected = (shares**2).sum(axis=1) / np.array(self.shape.top_k)
        for phase, layer, lag in zip(*np.nonzero(self._uses), strict=True):
            uses = self._uses[phase, layer, lag]
            row = {"phase": PHASES[phase], "layer": int(layer), "lag": LAGS[lag], "uses": int(uses)}
            rows.append(row | {"overlap": self._same[phase, layer, lag] / uses, "expected": expected[layer]})
        return rows

    def _reuse_rows(self) -> list[dict[str, Any]]:
        ends = [*WINDOWS, float("inf"), None]
        rows = []
        for phase in self._phases():
            for layer, counts in enumerate(self._distance[phase]):
                for end, uses in zip(ends, counts, strict=True):
                    row = {"phase": PHASES[phase], "layer": layer, "distance": end, "uses": int(uses)}
                    rows.append(row | {"share": uses / max(1, counts.sum())})
        return rows

    def _working_rows(self) -> list[dict[str, Any]]:
        rows = []
        for layer, size in enumerate(self.shape.experts_per_layer):
            for number in np.flatnonzero(self._windows):
                mean = self._distinct[layer, number] / self._windows[number]
                row = {"layer": layer, "window": WINDOWS[number], "distinct": mean, "share": mean / size}
                rows.append(row | {"windows": int(self._windows[number])})
        return rows

    def _overlap_chart(self, rows: list[dict[str, Any]]) -> Lines:
        series = []
        for phase in self._phases():
            mine = [row for row in rows if row["phase"] == PHASES[phase]]
            lags = sorted({row["lag"] for row in mine})
            means = [np.mean([row["overlap"] for row in mine if row["lag"] == lag]) for lag in lags]
            series.append(Series(PHASES[phase], [float(lag) for lag in lags], numbers(means)))
        lags = sorted({row["lag"] for row in rows})
        expected = numbers(np.mean([row["expected"] for row in rows if row["lag"] == lag]) for lag in lags)
        series.append(Series("independent tokens", [float(lag) for lag in lags], expected, dashed=True))
        return Lines(
            "overlap", "Overlap with an earlier token", "lag, tokens", "share of k in common", series, log=True
        )

    def _reuse_chart(self) -> Lines:
        series = []
        for phase in self._phases():
            counts = self._distance[phase].sum(axis=0)
            below = np.cumsum(counts[: len(WINDOWS)]) / max(1, counts.sum())
            series.append(Series(PHASES[phase], [float(w) for w in WINDOWS], numbers(below)))
        return Lines("reuse", "Reuse distance", "tokens since the last use, at most", "share of uses", series, log=True)

    def _working_chart(self, rows: list[dict[str, Any]]) -> Lines:
        layers = sorted({0, self.shape.layers // 2, self.shape.layers - 1})
        series = []
        for layer in layers:
            mine = [row for row in rows if row["layer"] == layer]
            series.append(
                Series(f"layer {layer}", [float(r["window"]) for r in mine], numbers(r["share"] for r in mine))
            )
        windows = sorted({row["window"] for row in rows})
        means = [np.mean([row["share"] for row in rows if row["window"] == w]) for w in windows]
        series.append(Series("mean of layers", [float(w) for w in windows], numbers(means), dashed=True))
        title = "Working set of a layer, all phases"
        return Lines("working_set", title, "window, tokens", "distinct experts / E", series, log=True)

    def _previous(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        out = {}
        for phase in PHASES:
            mine = [row for row in rows if row["phase"] == phase and row["lag"] == 1]
            if mine:
                out[phase] = {key: float(np.mean([row[key] for row in mine])) for key in ("overlap", "expected")}
        return out


def _finding(phase: str, value: dict[str, float]) -> str:
    return (
        f"{phase}: {value['overlap']:.3f} of the experts of a token were chosen by the token before, mean of layers; "
        f"{value['expected']:.3f} if tokens were independent."
    )
