"""Do two groups of prompts use experts differently? Permutation of whole prompts, corrected for many comparisons.

Shapes: P prompts of both groups, L layers, E experts, N permutations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """``divergence``, ``distance``, ``null``, ``p`` are [L]; ``shares`` [2, L, E]; ``d`` and ``expert_p`` [L, E].

    ``divergence``: Jensen-Shannon, bits, of the mean use of experts; ``null`` its mean under permutation; ``distance``:
    total variation; ``p`` not corrected. ``d``: Cohen's d over prompts; ``expert_p`` corrected by the largest
    difference of any expert of any layer (Westfall & Young, 1993), so that none of them is an accident at that level.
    """

    divergence: Array
    distance: Array
    null: Array
    p: Array
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
    extreme, above = np.zeros(len(divergence)), np.zeros(largest.shape)
    total = np.zeros(len(divergence))
    for group in _labels(member, permutations, both[0].nbytes, rng):
        a, b = _means(both, group)
        null = jensen_shannon(a, b)
        total += null.sum(axis=0)
        extreme += (null >= divergence - 1e-12).sum(axis=0)
        most = _standardised(a, b, spread).reshape(len(group), -1).max(axis=1)
        above += (most[:, None, None] >= largest - 1e-12).sum(axis=0)
    return Difference(
        divergence=divergence,
        distance=np.abs(shares[0] - shares[1]).sum(axis=-1) / 2,
        null=total / permutations,
        p=(1 + extreme) / (permutations + 1),
        shares=shares,
        d=cohens_d(first, second),
        expert_p=(1 + above) / (permutations + 1),
    )


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected by Holm (1979): the chance of any false finding stays below the level."""
    order = np.argsort(values, kind="stable")
    out = np.empty(len(values))
    highest = 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - place) * values[index]))
        out[index] = highest
    return [float(value) for value in out]


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
