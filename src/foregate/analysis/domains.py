"""Do domains route differently? Use of experts compared between every two domains, with effect sizes and significance.

Shapes: P prompts of a domain, L layers, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.chart import Heat, Lines, Series, numbers
from foregate.analysis.permutation import Difference, compare, smallest_p
from foregate.analysis.prompt import Prompt, Shape
from foregate.analysis.section import Section
from foregate.analysis.settings import Settings
from foregate.analysis.table import records
from foregate.analysis.usage import count_usage

LEVEL = 0.05
CURVES = 5
"""Pairs of domains drawn by layer; more cannot be told apart."""
LAYER_COLUMNS = ("first", "second", "layer", "divergence", "null", "distance", "p", "p_corrected", "significant")
EXPERT_COLUMNS = ("first", "second", "layer", "expert", "share_first", "share_second", "cohens_d", "p_corrected")
METHOD = (
    "Every prompt gives its shares of use of the experts of a layer and counts once. Layers: Jensen-Shannon "
    "divergence (bits) between the mean shares of two domains, and total variation. Experts: Cohen's d over prompts. "
    "Significance by permuting whole prompts between the domains. p is corrected by the largest difference of any "
    "layer (of any expert of any layer) in each permutation (Westfall & Young), which covers all layers (experts) of a "
    "pair, and multiplied by the number of pairs of domains (Bonferroni). 'null' is the divergence that permuted "
    "domains have: what finite numbers of prompts give alone."
)


class Domains:
    """Holds the use of experts of up to ``domain_prompts`` prompts a domain: 4 bytes x P x L x E."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.shape, self.settings = shape, settings
        self._shares: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
        self._prompts: dict[str, int] = defaultdict(int)

    def add(self, prompt: Prompt) -> None:
        self._prompts[prompt.domain] += 1
        if prompt.compared:
            counts = count_usage(prompt, self.shape)
            self._shares[prompt.domain].append((counts / counts.sum(axis=1, keepdims=True)).astype(np.float32))

    def finish(self) -> Section:
        phase = "prefill and decode" if self.settings.phase == "all" else self.settings.phase
        section = Section("domains", "Domains", f"all experts, {phase}, by prompt", METHOD)
        section.summary = {"prompts": dict(self._prompts)}
        chosen = self._comparable(section)
        if len(chosen) < 2:
            section.notes.append("Fewer than two domains have two or more prompts: no comparison.")
            return section
        rng = np.random.default_rng(self.settings.seed)
        held = {name: np.stack(self._shares[name]) for name in chosen}
        pairs = list(combinations(chosen, 2))
        found = {pair: compare(held[pair[0]], held[pair[1]], self.settings.permutations, rng) for pair in pairs}
        layers = _layer_rows(found)
        experts = [row for pair, one in found.items() for row in self._expert_rows(pair, one, len(pairs))]
        section.tables = [
            records("domain_layers", "Divergence of two domains in every layer", layers, LAYER_COLUMNS),
            records("domain_experts", "Use of every expert in two domains", experts, EXPERT_COLUMNS),
        ]
        section.charts = [_matrix(layers, chosen), _chart(layers)]
        section.summary["pairs"] = [_pair_summary(pair, layers, experts) for pair in pairs]
        section.findings = [_finding(row, self.shape) for row in section.summary["pairs"]]
        section.notes += [note for pair in pairs for note in self._powerless(pair, len(pairs))]
        return section

    def _comparable(self, section: Section) -> list[str]:
        enough = [name for name, shares in self._shares.items() if len(shares) > 1]
        few = [name for name in self._prompts if name not in enough]
        if few:
            section.notes.append(f"One prompt cannot be compared: {', '.join(few)}.")
        largest = sorted(enough, key=lambda name: -self._prompts[name])[: self.settings.domains]
        if len(largest) < len(enough):
            section.notes.append(f"Of {len(enough)} domains the {len(largest)} largest are compared.")
        if any(self._prompts[name] > self.settings.domain_prompts for name in largest):
            section.notes.append(
                f"At most {self.settings.domain_prompts} prompts of a domain, chosen by hash, are used."
            )
        return [name for name in enough if name in largest]

    def _powerless(self, pair: tuple[str, str], pairs: int) -> list[str]:
        """Says so where no difference, however large, could be significant."""
        sizes = [len(self._shares[name]) for name in pair]
        least = pairs * smallest_p(sizes[0], sizes[1], self.settings.permutations)
        if least < LEVEL:
            return []
        return [
            f"{pair[0]} and {pair[1]}: with {sizes[0]} and {sizes[1]} prompts, {self.settings.permutations:,} "
            f"permutations and {len(self._shares)} domains p cannot fall below {min(1.0, least):.2g}: no difference "
            "could be shown."
        ]

    def _expert_rows(self, pair: tuple[str, str], found: Difference, pairs: int) -> list[dict[str, Any]]:
        rows = []
        for layer, size in enumerate(self.shape.experts_per_layer):
            for expert in range(size):
                at = (layer, expert)
                found_here = (
                    found.shares[0][at],
                    found.shares[1][at],
                    found.d[at],
                    min(1.0, pairs * found.expert_p[at]),
                )
                values = (*pair, layer, expert, *(float(value) for value in found_here))
                rows.append(dict(zip(EXPERT_COLUMNS, values, strict=True)))
        return rows


def _layer_rows(found: dict[tuple[str, str], Difference]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for pair, one in found.items():
        corrected = np.minimum(1, len(found) * one.layer_p)
        for layer, values in enumerate(zip(one.divergence, one.null, one.distance, one.p, corrected, strict=True)):
            numbered = (*pair, layer, *(float(value) for value in values), bool(corrected[layer] < LEVEL))
            rows.append(dict(zip(LAYER_COLUMNS, numbered, strict=True)))
    return rows


def _pair_summary(pair: tuple[str, str], layers: list[dict[str, Any]], experts: list[dict[str, Any]]) -> dict[str, Any]:
    mine = [row for row in layers if (row["first"], row["second"]) == pair]
    theirs = [row for row in experts if (row["first"], row["second"]) == pair]
    most = max(theirs, key=lambda row: abs(row["cohens_d"]))
    return {
        "first": pair[0],
        "second": pair[1],
        "divergence": float(np.mean([row["divergence"] for row in mine])),
        "null": float(np.mean([row["null"] for row in mine])),
        "significant_layers": sum(row["significant"] for row in mine),
        "significant_experts": sum(row["p_corrected"] < LEVEL for row in theirs),
        "smallest_p": min(row["p_corrected"] for row in mine),
        "largest_effect": {key: most[key] for key in ("layer", "expert", "cohens_d", "p_corrected")},
    }


def _matrix(rows: list[dict[str, Any]], names: list[str]) -> Heat:
    """Mean divergence of every two domains over layers, above the diagonal; what permuted domains have below it."""
    values = np.full((len(names), len(names)), np.nan)
    for a, b in combinations(range(len(names)), 2):
        mine = [row for row in rows if (row["first"], row["second"]) == (names[a], names[b])]
        values[a, b], values[b, a] = (float(np.mean([row[key] for row in mine])) for key in ("divergence", "null"))
    title = "Divergence of domains; below the diagonal: permuted"
    return Heat("domain_matrix", title, "domain", "domain", "Jensen-Shannon, bits", values, names, names)


def _chart(rows: list[dict[str, Any]]) -> Lines:
    """By layer, the pairs that differ most; the matrix and the table have all."""
    mean: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        mean[row["first"], row["second"]].append(row["divergence"])
    largest = sorted(mean, key=lambda pair: -float(np.mean(mean[pair])))[:CURVES]
    series = []
    for pair in largest:
        mine = [row for row in rows if (row["first"], row["second"]) == pair]
        x = [float(row["layer"]) for row in mine]
        series.append(Series(" / ".join(pair), x, numbers(row["divergence"] for row in mine)))
        if pair == largest[0]:
            null = Series("permuted, first pair", x, numbers(row["null"] for row in mine), dashed=True)
    title = "Divergence of domains" + (f", the {CURVES} largest" if len(mean) > CURVES else "")
    return Lines("domain_divergence", title, "MoE layer", "Jensen-Shannon, bits", [*series, null])


def _finding(row: dict[str, Any], shape: Shape) -> str:
    verdict = "differ" if row["significant_layers"] else "are not shown to differ"
    effect = row["largest_effect"]
    return (
        f"{row['first']} and {row['second']} {verdict}: {row['significant_layers']} of {shape.layers} layers "
        f"significant at 5 % (corrected), divergence {row['divergence']:.4f} bits against {row['null']:.4f} permuted; "
        f"{row['significant_experts']} experts significant; largest effect d = {effect['cohens_d']:.2f} (layer "
        f"{effect['layer']}, expert {effect['expert']})."
    )
