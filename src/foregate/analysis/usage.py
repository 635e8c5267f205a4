"""How evenly experts are used: entropies over the whole trace and within a prompt. Shapes: L layers, E experts."""

from __future__ import annotations

import numpy as np

from foregate.analysis.chart import Heat, Lines, Series, numbers
from foregate.analysis.information import normalised_entropy
from foregate.analysis.prompt import Prompt, Shape
from foregate.analysis.section import Section
from foregate.analysis.settings import Settings
from foregate.analysis.table import Table, table

METHOD = (
    "Entropy of the experts chosen (every choice counts once), divided by log2 E: 1 is uniform. 'By layer' is the "
    "mean over layers; 'ids pooled' adds up the counts of equal expert numbers over all layers first, which is how "
    "figures such as 0.976 are published and which is near 1 whatever the layers do, because numbers of different "
    "layers mean nothing to each other; 'within a prompt' is the mean over prompts and layers, and low for short "
    "prompts."
)


class Usage:
    """Choices of every expert, [L, E], and the mean entropy within prompts."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.shape, self.settings = shape, settings
        self.counts = np.zeros((shape.layers, shape.experts), np.int64)
        self.tokens = self.prompts = 0
        self._within = np.zeros(shape.layers)

    def add(self, prompt: Prompt) -> None:
        counts = count_usage(prompt, self.shape)
        self.counts += counts
        self.tokens += prompt.tokens
        self.prompts += 1
        sizes = self.shape.experts_per_layer
        self._within += [normalised_entropy(counts[n], size) for n, size in enumerate(sizes)]

    def finish(self) -> Section:
        sizes = self.shape.experts_per_layer
        phase = "prefill and decode" if self.settings.phase == "all" else self.settings.phase
        arm = f"all experts, {phase}, {self.tokens:,} tokens of {self.prompts:,} prompts"
        section = Section("usage", "Use of experts", arm, METHOD)
        by_layer = np.array([normalised_entropy(self.counts[n], size) for n, size in enumerate(sizes)])
        within = self._within / max(1, self.prompts)
        pooled = normalised_entropy(self.counts.sum(axis=0), self.shape.experts)
        busiest = self.counts.max(axis=1) / self.tokens
        unused = [int((self.counts[n, :size] == 0).sum()) for n, size in enumerate(sizes)]
        section.summary = {
            "entropy_by_layer": _mean(by_layer),
            "entropy_ids_pooled": pooled,
            "entropy_within_prompt": _mean(within),
            "unused_experts": sum(unused),
        }
        if min(sizes) < 2:
            section.notes.append("Layers with one expert leave no choice; their entropy is not defined.")
        section.findings.append(
            f"Normalised entropy {_mean(by_layer):.3f} by layer, {pooled:.3f} with ids pooled, {_mean(within):.3f} "
            f"within a prompt; {sum(unused)} of {self.shape.total} experts were never chosen."
        )
        layers = list(range(self.shape.layers))
        what = "Normalised entropy and extremes of every layer"
        columns = {"layer": layers, "entropy": by_layer, "entropy_within_prompt": within}
        section.tables.append(table("usage_by_layer", what, **columns, busiest_share=busiest, unused=unused))
        section.tables.append(self._table())
        section.charts = [
            Lines(
                "entropy",
                "Entropy of every layer",
                "MoE layer",
                "normalised entropy",
                [_series("all tokens", layers, by_layer), _series("within a prompt", layers, within)],
            ),
            Heat("usage", "Use of experts", "expert", "MoE layer", "share of tokens", self._shares()),
        ]
        return section

    def _shares(self) -> np.ndarray:
        shares = self.counts / self.tokens
        for layer, size in enumerate(self.shape.experts_per_layer):
            shares[layer, size:] = np.nan
        return shares

    def _table(self) -> Table:
        layer, expert = np.nonzero(np.isfinite(self._shares()))
        counts = self.counts[layer, expert]
        what = "Tokens that chose each expert"
        return table("usage", what, layer=layer, expert=expert, tokens=counts, share=counts / self.tokens)


def count_usage(prompt: Prompt, shape: Shape) -> np.ndarray:
    """Choices [L, E] of one prompt."""
    width = shape.experts + 1
    ids = prompt.experts % width + np.arange(shape.layers)[:, None] * width
    counts = np.bincount(ids.reshape(-1), minlength=shape.layers * width)
    return counts.reshape(shape.layers, width)[:, : shape.experts]


def _series(name: str, x: list[int], y: np.ndarray) -> Series:
    return Series(name, [float(value) for value in x], numbers(y))


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
