"""Paths over full depth: the experts that a token goes through, from the first MoE layer to the last.

Shapes: T tokens, L layers, k chosen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.chart import Lines, Series, numbers
from foregate.analysis.prefixes import COLUMNS as PREFIX_COLUMNS
from foregate.analysis.prefixes import PREFIXES, prefix_rows
from foregate.analysis.prompt import Prompt, Shape
from foregate.analysis.section import Section
from foregate.analysis.settings import Settings
from foregate.analysis.sketch import BottomK, HeavyHitters, hash_rows
from foregate.analysis.table import records

TOP = 100
KINDS = ("first expert", "whole set")
METHOD = (
    "first expert: the expert with the largest router weight in every layer; whole set: all k of every layer, in any "
    "order. Paths are hashed to 64 bits and held in two sketches: the most frequent (Misra-Gries, counts at most "
    "'error' too low) and a uniform sample of distinct paths with exact counts (bottom-k). Both are exact while there "
    "are no more distinct paths than the sketch holds. P(expert | prefix) is counted over the held paths of first "
    "experts, for prefixes of five tokens or more."
)


class Paths:
    """Two sketches for each kind of path; about 2 x C x (16 + 4 L k) bytes."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.shape, self.settings = shape, settings
        widths = (shape.layers, shape.layers * max(shape.top_k))
        self._heavy = [HeavyHitters(settings.sketch, width) for width in widths]
        self._sample = [BottomK(settings.sketch) for _ in widths]
        self._waiting: list[NDArray[np.int32]] = []
        self._held = self.tokens = 0

    def add(self, prompt: Prompt) -> None:
        self._waiting.append(prompt.experts)
        self._held += prompt.tokens
        if self._held >= self.settings.sketch // 4:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        experts = np.concatenate(self._waiting)
        self.tokens += len(experts)
        self._waiting, self._held = [], 0
        for number, rows in enumerate((experts[:, :, 0], np.sort(experts, axis=2).reshape(len(experts), -1))):
            hashes, first, counts = np.unique(hash_rows(rows), return_index=True, return_counts=True)
            self._heavy[number].add(hashes, counts, rows[first])
            self._sample[number].add(hashes, counts)

    def finish(self) -> Section:
        self._flush()
        phase = "prefill and decode" if self.settings.phase == "all" else self.settings.phase
        section = Section("paths", "Paths over full depth", f"all experts, {phase}, {self.tokens:,} tokens", METHOD)
        facts, tops, curves, series = [], [], [], []
        for kind, heavy, sample in zip(KINDS, self._heavy, self._sample, strict=True):
            order = heavy.top()
            covered = np.cumsum(heavy.counts[order]) / self.tokens
            facts.append(_facts(kind, heavy, sample, covered, self.tokens))
            tops += _top(kind, heavy, order, self.shape, self.tokens)
            marks = _marks(len(covered))
            curves += [{"kind": kind, "paths": m, "coverage": float(covered[m - 1])} for m in marks]
            series.append(Series(kind, [float(m) for m in marks], numbers(covered[m - 1] for m in marks)))
            section.findings.append(_finding(facts[-1]))
        section.summary = {fact["kind"]: fact for fact in facts}
        names = ("kind", "tokens", "distinct", "distinct_share", "once", "top_share", "top100_share", "exact", "error")
        section.tables = [
            records("paths", "Number of distinct paths and how far the most frequent go", facts, names),
            records("top_paths", "Most frequent paths", tops, ("kind", "rank", "path", "tokens", "share")),
            records("path_coverage", "Tokens covered by the n most frequent", curves, ("kind", "paths", "coverage")),
        ]
        held = self._heavy[0]
        section.tables += [
            records("path_histogram", "Distinct paths by the tokens that take them", *self._histogram()),
            records(
                "prefix_conditional",
                f"P(first expert of a later layer | first experts of layers 0 … l), {PREFIXES} most frequent prefixes",
                list(prefix_rows(held.examples, held.counts)),
                PREFIX_COLUMNS,
            ),
        ]
        title = "Coverage by the most frequent paths"
        section.charts = [
            Lines("path_coverage", title, "paths", "share of tokens", series, log=True),
            self._histogram_chart(),
        ]
        return section

    def _histogram(self) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        """Share of the distinct paths taken by at most 1, 2, 4 … tokens and more than half of that."""
        rows = []
        for kind, sample in zip(KINDS, self._sample, strict=True):
            shares = np.bincount(np.ceil(np.log2(sample.counts)).astype(int)) / len(sample.counts)
            rows += [{"kind": kind, "at_most": 2**n, "share": float(share)} for n, share in enumerate(shares)]
        return rows, ("kind", "at_most", "share")

    def _histogram_chart(self) -> Lines:
        rows, _ = self._histogram()
        series = []
        for kind in KINDS:
            mine = [row for row in rows if row["kind"] == kind]
            series.append(Series(kind, [float(row["at_most"]) for row in mine], [row["share"] for row in mine]))
        title = "Paths by how many tokens take them"
        return Lines("path_histogram", title, "tokens of a path, at most", "share of distinct paths", series, log=True)


def _facts(kind: str, heavy: HeavyHitters, sample: BottomK, covered: NDArray[Any], tokens: int) -> dict[str, Any]:
    distinct = min(sample.distinct, float(tokens))
    return {
        "kind": kind,
        "tokens": tokens,
        "distinct": distinct,
        "distinct_share": distinct / tokens,
        "once": sample.once,
        "top_share": float(covered[0]) if len(covered) else 0.0,
        "top100_share": float(covered[min(TOP, len(covered)) - 1]) if len(covered) else 0.0,
        "exact": sample.exact and not heavy.error,
        "error": heavy.error,
    }


def _top(kind: str, heavy: HeavyHitters, order: Any, shape: Shape, tokens: int) -> list[dict[str, Any]]:
    rows = []
    for rank, index in enumerate(order[:TOP], 1):
        count = int(heavy.counts[index])
        path = _spelled(heavy.examples[index], shape)
        rows.append({"kind": kind, "rank": rank, "path": path, "tokens": count, "share": count / tokens})
    return rows


def _spelled(row: NDArray[np.int32], shape: Shape) -> str:
    """``3-17-4``, or ``3+9-17+20-…`` for sets."""
    steps = row.reshape(shape.layers, -1)
    return "-".join("+".join(str(expert) for expert in step if expert >= 0) for step in steps)


def _marks(length: int) -> list[int]:
    """1, 2, 4, … and ``length``."""
    return sorted({min(length, 2**n) for n in range(length.bit_length() + 1)}) if length else []


def _finding(fact: dict[str, Any]) -> str:
    about = "" if fact["exact"] else "about "
    return (
        f"{fact['kind']}: {about}{fact['distinct']:,.0f} distinct paths over {fact['tokens']:,} tokens "
        f"({fact['distinct_share']:.1%}), {fact['once']:.1%} of them seen once; the 100 most frequent cover "
        f"{fact['top100_share']:.2%} of the tokens."
    )
