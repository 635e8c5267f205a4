"""P(e_m | e_l) for every pair of layers, correlation, mutual information, affinity and co-activation.

Shapes: L layers, E experts, k chosen. ``a`` is an expert of the earlier layer l, ``b`` one of the later layer m.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from foregate.analysis.chart import Heat, Matrices
from foregate.analysis.information import associate, conditional, correlation
from foregate.analysis.pairs import PairCounts, as_float
from foregate.analysis.prompt import Prompt, Shape
from foregate.analysis.section import Section
from foregate.analysis.settings import Settings
from foregate.analysis.table import Table, records

EMBED_BYTES = 4 << 20
"""Matrices put into the report, shortest hops first; the table has all of them."""
METHOD = (
    "P(b | a) is the share of tokens that chose a in layer l which chose b in layer m = l + h; a row sums to k. "
    "Mutual information and Cramér's V are of a random chosen pair (one of the k experts of each layer), adjusted for "
    "chance: 0 is what independent routing gives, 1 would be all of the smaller entropy; affinity is the mutual "
    "information so adjusted. phi is Pearson's correlation between 'a is chosen' and 'b is chosen'."
)
PAIR_COLUMNS = ("layer", "later", "hop", "mi_plain", "mi_corrected", "affinity", "cramers_v", "best_phi")
SAME_COLUMNS = ("layer", "pairs_seen", "max_lift", "mean_abs_phi", "strongest_a", "strongest_b", "strongest_p")


class CrossLayer:
    """Counts train and test prompts apart: ``train`` is what predictions may be made from."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.shape, self.settings = shape, settings
        self.train, self.test = PairCounts(shape, settings.max_hop), PairCounts(shape, settings.max_hop)

    def add(self, prompt: Prompt) -> None:
        (self.test if prompt.test else self.train).add(prompt.experts)

    def flush(self) -> None:
        """Make the counts readable."""
        self.train.flush()
        self.test.flush()

    def finish(self) -> Section:
        """Merges the test prompts into ``train``, so it comes after all scoring."""
        self.flush()
        self.train.merge(self.test)
        counts = self.train
        arm = f"all experts, {_phase(self.settings.phase)}, {counts.tokens:,} tokens (train and test prompts)"
        section = Section("cross_layer", "Between layers", arm, METHOD)
        section.tables.append(_same_layer(counts))
        section.tables.append(_probabilities("coactivation", "Two experts of one layer chosen by one token", counts, 0))
        if self.shape.layers < 2:
            section.notes.append("The model has one MoE layer: nothing about pairs of layers can be computed.")
            return section
        if counts.hops < self.shape.layers - 1:
            section.notes.append(f"Hops above {counts.hops} were not counted (--max-hop).")
        rows = _pairs(counts)
        section.tables.append(
            records("layer_pairs", "Association of every pair of layers, in bits", rows, PAIR_COLUMNS)
        )
        what = "P(b in later | a in layer), lift over P(b), phi; pairs that never occur are left out"
        section.tables.append(_probabilities("conditional", what, counts, 1))
        section.summary = _summary(rows)
        section.findings = [_finding(section.summary)]
        section.charts = [
            _heat(rows, "affinity", "Affinity of layers", "normalised mutual information", self.shape.layers),
            _heat(rows, "cramers_v", "Association of layers", "Cramér's V, corrected", self.shape.layers),
            _matrices(counts),
        ]
        return section


def _pairs(counts: PairCounts) -> list[dict[str, Any]]:
    rows = []
    for layer, later in _hops(counts, 1):
        joint, first, second = _of(counts, layer, later)
        found = associate(joint, first, second, counts.tokens, (counts.shape.top_k[layer], counts.shape.top_k[later]))
        values = (found.plain, found.corrected, found.normalised, found.cramers_v, found.best_phi)
        rows.append(dict(zip(PAIR_COLUMNS, (layer, later, later - layer, *values), strict=True)))
    return rows


def _probabilities(name: str, description: str, counts: PairCounts, shortest: int) -> Table:
    """All pairs of ``shortest`` hops or more (0: within a layer only), one chunk a pair of layers."""

    def chunks() -> Iterator[pa.Table]:
        for layer, later in _hops(counts, shortest):
            if shortest == 0 and later != layer:
                continue
            joint, first, second = _of(counts, layer, later)
            keep = joint > 0
            if layer == later:
                keep &= ~np.eye(len(joint), dtype=bool)
            a, b = np.nonzero(keep)
            chance = conditional(joint, first)[a, b]
            phi = correlation(joint, first, second, counts.tokens)[a, b]
            columns = {
                "layer": np.full(len(a), layer, np.uint16),
                "later": np.full(len(a), later, np.uint16),
                "hop": np.full(len(a), later - layer, np.uint16),
                "a": a.astype(np.uint16),
                "b": b.astype(np.uint16),
                "tokens_a": first[a].astype(np.int64),
                "tokens_both": joint[a, b].astype(np.int64),
                "probability": chance,
                "lift": chance * counts.tokens / second[b],
                "phi": phi,
            }
            yield pa.table({key: pa.array(values, from_pandas=True) for key, values in columns.items()})

    return Table(name, description, chunks)


def _same_layer(counts: PairCounts) -> Table:
    """The strongest co-activation of every layer, with its correlation over all pairs."""
    rows = []
    for layer, top_k in enumerate(counts.shape.top_k):
        joint, chosen, _ = _of(counts, layer, layer)
        off = np.triu(np.ones(joint.shape, dtype=bool), 1) & (np.outer(chosen, chosen) > 0)
        row: dict[str, Any] = {"layer": layer, "pairs_seen": int((joint[off] > 0).sum())}
        if top_k > 1 and off.any():
            expected = np.outer(chosen, chosen) / counts.tokens
            lift = np.where(off & (joint >= 5), joint / np.where(expected > 0, expected, 1), 0)
            a, b = np.unravel_index(int(lift.argmax()), lift.shape)
            phi = correlation(joint, chosen, chosen, counts.tokens)[off]
            row |= {"max_lift": float(lift[a, b]), "mean_abs_phi": _mean(np.abs(phi[np.isfinite(phi)]))}
            if lift[a, b] > 0:
                row |= {"strongest_a": int(a), "strongest_b": int(b), "strongest_p": float(joint[a, b] / chosen[a])}
        rows.append(row)
    what = "Co-activation within a layer: strongest pair (at least 5 tokens) by lift over independence, mean |phi|"
    return records("coactivation_by_layer", what, rows, SAME_COLUMNS)


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by_hop: dict[int, list[float]] = {}
    for row in rows:
        by_hop.setdefault(row["hop"], []).append(row["affinity"])
    means = {hop: _mean(np.array(values)) for hop, values in sorted(by_hop.items())}
    finite = [row for row in rows if np.isfinite(row["affinity"])]
    best = max(finite, key=lambda row: row["affinity"], default=None)
    strongest = None if best is None else {key: best[key] for key in ("layer", "later", "affinity", "mi_corrected")}
    return {"affinity_by_hop": means, "strongest": strongest}


def _finding(summary: dict[str, Any]) -> str:
    best = summary["strongest"]
    if best is None:
        return "No layer has more than one expert in use, so no layer can say anything about another."
    return (
        f"Adjacent layers share {summary['affinity_by_hop'][1]:.3f} of their entropy on average; the strongest pair is "
        f"{best['layer']} → {best['later']} with {best['affinity']:.3f} ({best['mi_corrected']:.2f} bits)."
    )


def _heat(rows: list[dict[str, Any]], key: str, title: str, label: str, layers: int) -> Heat:
    values = np.full((layers, layers), np.nan)
    for row in rows:
        values[row["layer"], row["later"]] = values[row["later"], row["layer"]] = row[key]
    return Heat(key, title, "MoE layer", "MoE layer", label, values)


def _matrices(counts: PairCounts) -> Matrices:
    cells: dict[str, bytes] = {}
    sizes = counts.shape.experts_per_layer
    held = 0
    for layer, later in sorted(_hops(counts, 0), key=lambda pair: (pair[1] - pair[0], pair[0])):
        held += sizes[layer] * sizes[later]
        if held > EMBED_BYTES:
            break
        joint, first, _ = _of(counts, layer, later)
        shares = np.nan_to_num(conditional(joint, first))[: sizes[layer], : sizes[later]]
        if layer == later:
            np.fill_diagonal(shares, 0)
        cells[f"{layer},{later}"] = np.rint(255 * np.sqrt(shares)).astype(np.uint8).tobytes()
    title = "P(expert b | expert a) of two layers, or of one (co-activation)"
    return Matrices("conditional", title, "expert b", "expert a", list(sizes), cells)


def _hops(counts: PairCounts, shortest: int) -> Iterator[tuple[int, int]]:
    layers = counts.shape.layers
    for layer in range(layers):
        for later in range(layer + shortest, min(layers, layer + counts.hops + 1)):
            yield layer, later


def _of(counts: PairCounts, layer: int, later: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return as_float(counts.pair(layer, later)), as_float(counts.chosen(layer)), as_float(counts.chosen(later))


def _phase(phase: str) -> str:
    return "prefill and decode" if phase == "all" else phase


def _mean(values: NDArray[Any]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
