"""Counting very many distinct things in bounded memory. Both sketches are exact while they hold every distinct item.

Shapes: n items of a batch, C capacity of a sketch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]


class BottomK:
    """Distinct items by their C smallest 64-bit hashes, each with its exact count (Cohen & Kaplan, 2007).

    What is among the C smallest at the end was so from its first occurrence on, because the bound only falls; so the
    sample is uniform over distinct items and its counts are complete. Relative error of ``distinct``: 1/sqrt(C - 2).
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.hashes: Hashes = np.zeros(0, np.uint64)
        self.counts = np.zeros(0, np.int64)
        self.exact = True

    def add(self, hashes: Hashes, counts: NDArray[np.int64]) -> None:
        """Distinct ``hashes`` [n] with how often each occurred."""
        self.hashes, self.counts, _ = _merged(self.hashes, self.counts, hashes, counts)
        if len(self.hashes) > self.capacity:
            self.exact = False
            self.hashes, self.counts = self.hashes[: self.capacity], self.counts[: self.capacity]

    @property
    def distinct(self) -> float:
        """Estimate of the number of distinct items: exact, or (C - 1) / the C-th smallest hash as a share."""
        if self.exact:
            return float(len(self.hashes))
        return (self.capacity - 1) / (float(self.hashes[-1]) / 2.0**64)

    @property
    def once(self) -> float:
        """Share of the distinct items that occurred once."""
        return float((self.counts == 1).mean()) if len(self.counts) else float("nan")


class HeavyHitters:
    """The most frequent items with counts at most ``error`` too low (Misra & Gries, 1982; Agarwal et al., 2013).

    Every item that occurs more than ``error`` times is held, with a row of its own as an example of it.
    """

    def __init__(self, capacity: int, width: int) -> None:
        self.capacity = capacity
        self.hashes: Hashes = np.zeros(0, np.uint64)
        self.counts = np.zeros(0, np.int64)
        self.examples = np.zeros((0, width), np.int32)
        self.error = 0

    def add(self, hashes: Hashes, counts: NDArray[np.int64], examples: NDArray[np.int32]) -> None:
        """Distinct ``hashes`` [n] with their counts and one row [n, width] of each."""
        rows = np.concatenate([self.examples, examples])
        self.hashes, self.counts, first = _merged(self.hashes, self.counts, hashes, counts)
        self.examples = rows[first]
        if len(self.hashes) > self.capacity:
            least = int(np.partition(self.counts, -self.capacity - 1)[-self.capacity - 1])
            self.error += least
            keep = self.counts > least
            self.hashes, self.examples = self.hashes[keep], self.examples[keep]
            self.counts = self.counts[keep] - least

    def top(self) -> NDArray[np.intp]:
        """Indices by count, largest first; equal counts by hash."""
        return np.lexsort((self.hashes, -self.counts))


def _merged(a: Hashes, a_counts: Any, b: Hashes, b_counts: Any) -> tuple[Hashes, NDArray[np.int64], Any]:
    """Distinct hashes in order, their summed counts, and where each was first."""
    hashes, first, where = np.unique(np.concatenate([a, b]), return_index=True, return_inverse=True)
    counts = np.zeros(len(hashes), np.int64)
    np.add.at(counts, where, np.concatenate([a_counts, b_counts]))
    return hashes, counts, first


def hash_rows(rows: NDArray[np.int32]) -> Hashes:
    """64-bit hash of every row [n, width]: one xorshift-multiply round (Stafford's mix 13) a column."""
    out = np.full(len(rows), 0x9E3779B97F4A7C15, np.uint64)
    for column in rows.T.astype(np.int64):
        out ^= (column + 1).astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
        out ^= out >> np.uint64(30)
        out *= np.uint64(0xBF58476D1CE4E5B9)
        out ^= out >> np.uint64(27)
        out *= np.uint64(0x94D049BB133111EB)
        out ^= out >> np.uint64(31)
    return out
