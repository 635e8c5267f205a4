"""Counts of experts chosen by the same token in two layers: the sufficient statistic of everything across layers.

Shapes: T tokens, L MoE layers, E experts of the widest layer, k chosen, H longest hop.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.prompt import Shape, multi_hot
from foregate.errors import ConfigError

BATCH_BYTES = 32 << 20
"""Of the multi-hot batch that is multiplied with itself."""

Counts = NDArray[np.uint32]


class PairCounts:
    """``pair(l, m)[a, b]`` = tokens that chose a in layer l and b in layer m. 4 bytes x about L(L+1)/2 x E²."""

    def __init__(self, shape: Shape, max_hop: int | None = None) -> None:
        self.shape = shape
        self.hops = hops(shape, max_hop)
        self.tokens = 0
        width, layers = shape.experts, shape.layers
        self._counts = [np.zeros((min(self.hops, layers - 1 - n) + 1, width, width), np.uint32) for n in range(layers)]
        self._rows = max(64, BATCH_BYTES // (4 * layers * width))
        self._waiting: list[NDArray[np.int32]] = []
        self._held = 0

    def add(self, experts: NDArray[np.int32]) -> None:
        """Count tokens [T, L, k]; they are multiplied in batches."""
        for begin in range(0, len(experts), self._rows):
            batch = experts[begin : begin + self._rows]
            self._waiting.append(batch)
            self._held += len(batch)
            if self._held >= self._rows:
                self.flush()

    def flush(self) -> None:
        """Count what is waiting for a full batch. Call it before reading."""
        if not self._held:
            return
        width = self.shape.experts
        batch = multi_hot(np.concatenate(self._waiting), width)
        flat = batch.reshape(len(batch), -1)
        for layer, counts in enumerate(self._counts):
            begin, end = layer * width, (layer + len(counts)) * width
            found = flat[:, begin : begin + width].T @ flat[:, begin:end]  # exact: float32 counts to 2^24
            counts += found.reshape(width, len(counts), width).transpose(1, 0, 2).astype(np.uint32)
        self.tokens += len(batch)
        self._waiting, self._held = [], 0

    def pair(self, layer: int, later: int) -> Counts:
        """[E, E] for ``layer`` <= ``later`` <= ``layer`` + H."""
        return np.asarray(self._counts[layer][later - layer])

    def chosen(self, layer: int) -> Counts:
        """[E]: tokens that chose each expert of ``layer``."""
        return np.asarray(np.diagonal(self._counts[layer][0]))

    def merge(self, other: PairCounts) -> None:
        """Add the counts of ``other``, of the same shape."""
        for mine, theirs in zip(self._counts, other._counts, strict=True):
            mine += theirs
        self.tokens += other.tokens


def hops(shape: Shape, max_hop: int | None) -> int:
    """H: the longest hop that is counted."""
    return min(shape.layers - 1, max_hop if max_hop is not None else shape.layers - 1)


def count_bytes(shape: Shape, max_hop: int | None) -> int:
    """Memory of one ``PairCounts``."""
    longest = hops(shape, max_hop)
    pairs = sum(min(longest, shape.layers - 1 - layer) + 1 for layer in range(shape.layers))
    return 4 * pairs * shape.experts**2


def check_bytes(shape: Shape, max_hop: int | None, limit: int) -> int:
    """Memory of the train and test counts; raises ConfigError, saying which ``max_hop`` fits, above ``limit``."""
    need = 2 * count_bytes(shape, max_hop)
    if need > limit:
        fits = [hop for hop in range(1, shape.layers) if 2 * count_bytes(shape, hop) <= limit]
        advice = f"--max-hop {fits[-1]} fits" if fits else "not even --max-hop 1 fits"
        raise ConfigError(f"pair counts of {shape.layers} layers would take {need:,} bytes, above {limit:,}; {advice}")
    return need


def as_float(counts: Counts) -> NDArray[Any]:
    """Counts as float64, in which products of two stay exact."""
    return counts.astype(np.float64)
