"""Do two groups of prompts use experts differently? Permutation of whole prompts, corrected for many comparisons.

Shapes: P prompts of both groups, L layers, E experts, N permutations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """``divergence``, ``distance``, ``null``, ``p``, ``layer_p`` are [L], ``shares`` [2, L, E], the rest [L, E].

    ``divergence``: Jensen-Shannon, bits, of the mean use of experts; ``null`` its mean under permutation; ``distance``:
    total variation; ``p`` not corrected; ``d``: Cohen's d over prompts. ``layer_p`` and ``expert_p`` are corrected by
    the largest difference of any layer, and of any expert of any layer, in each permutation (Westfall & Young, 1993):
    none of them is an accident at that level. Unlike Holm, that does not need more permutations for more layers.
    """

    divergence: Array
    distance: Array
    null: Array
    p: Array
    layer_p: Array
    shares: Array
    d: Array
    expert_p: Array


def compare(first: Array, second: Array, permutations: int, rng: np.random.Generator) -> Difference:
    """Compare shares of use, [P1, L, E] and [P2, L, E], each prompt counting once. p = (1 + as extreme) / (N + 1)."""
    both = np.concatenate([first, second]).astype(np.float64)
    member = np.r_[np.ones(len(first)), np.zeros(len(second))]
    spread = both.std(axis=0)
    shares = np.stack([first.mean(axis=0), second.mean(axis=0)])
    divergence = jensen_shannon(shares[0], shares[1])
    largest = _standardised(shares[0], shares[1], spread)
    above = np.zeros(largest.shape)
    nulls = []
    for group in _labels(member, permutations, both[0].nbytes, rng):
        a, b = _means(both, group)
        nulls.append(jensen_shannon(a, b))
        most = _standardised(a, b, spread).reshape(len(group), -1).max(axis=1)
        above += (most[:, None, None] >= largest - 1e-12).sum(axis=0)
    null = np.concatenate(nulls)
    return Difference(
        divergence=divergence,
        distance=np.abs(shares[0] - shares[1]).sum(axis=-1) / 2,
        null=null.mean(axis=0),
        p=(1 + (null >= divergence - 1e-12).sum(axis=0)) / (permutations + 1),
        layer_p=_largest_layer(divergence, null),
        shares=shares,
        d=cohens_d(first, second),
        expert_p=(1 + above) / (permutations + 1),
    )


def smallest_p(first: int, second: int, permutations: int) -> float:
    """The lowest p that groups of so many prompts can have: one over the permutations, or over the ways to divide."""
    ways = comb(first + second, first) // (2 if first == second else 1)  # equal groups: their exchange looks the same
    return max(1 / (permutations + 1), 1 / ways)


def jensen_shannon(a: Array, b: Array) -> Array:
    """Bits between distributions over the last axis: 0 for equal ones, 1 for disjoint ones."""
    middle = (a + b) / 2
    return np.maximum(0, (_relative(a, middle) + _relative(b, middle)) / 2)


def cohens_d(first: Array, second: Array) -> Array:
    """Difference of means over the pooled standard deviation of prompts; 0 where nothing varies."""
    freedom = len(first) + len(second) - 2
    squares = ((first - first.mean(axis=0)) ** 2).sum(axis=0) + ((second - second.mean(axis=0)) ** 2).sum(axis=0)
    pooled = np.sqrt(squares / max(1, freedom))
    difference = first.mean(axis=0) - second.mean(axis=0)
    return np.asarray(np.divide(difference, pooled, out=np.zeros(difference.shape), where=pooled > 0))


def _largest_layer(divergence: Array, null: Array) -> Array:
    """p of every layer [L] against the largest layer of each permutation [N, L], in units of the mean of a layer."""
    unit = (null.sum(axis=0) + divergence) / (len(null) + 1)  # the observed one included, so that all are exchangeable
    unit = np.where(unit > 0, unit, 1)
    most = (null / unit).max(axis=1)
    return np.asarray((1 + (most[:, None] >= divergence / unit - 1e-12).sum(axis=0)) / (len(null) + 1))


def _relative(a: Array, middle: Array) -> Array:
    ratio = np.divide(a, middle, out=np.ones_like(a, dtype=float), where=a > 0)
    return np.asarray((a * np.log2(ratio)).sum(axis=-1))


def _standardised(a: Array, b: Array, spread: Array) -> Array:
    difference = np.abs(a - b)
    return np.asarray(np.divide(difference, spread, out=np.zeros(difference.shape), where=spread > 0))


def _labels(member: Array, permutations: int, row_bytes: int, rng: np.random.Generator) -> Iterator[Array]:
    """Permuted membership, some rows of [P] at a time."""
    size = max(1, min(permutations, CHUNK_BYTES // max(1, row_bytes)))
    for begin in range(0, permutations, size):
        rows = np.tile(member, (min(size, permutations - begin), 1))
        yield rng.permuted(rows, axis=1)


def _means(both: Array, group: Array) -> tuple[Array, Array]:
    """Mean shares [n, L, E] of members and of the others, for every row of ``group`` [n, P]."""
    flat = both.reshape(len(both), -1)
    inside, members = group @ flat, group.sum(axis=1, keepdims=True)
    outside = flat.sum(axis=0) - inside
    shape = (len(group), *both.shape[1:])
    # the subtraction leaves tiny negatives where a domain never uses an expert
    others = np.maximum(0, outside / (len(both) - members))
    return (inside / members).reshape(shape), others.reshape(shape)
