"""Entropy, mutual information and association of expert choices, from counts.

Shapes: E experts, T tokens, k chosen. A layer's choice is a set, so a *random chosen pair* is what the joint
distribution is over: A uniform over the k experts chosen in one layer, B over those in the other, by the same token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def entropy(counts: Array) -> float:
    """Bits of the distribution proportional to ``counts``; NaN for no counts."""
    total = counts.sum()
    if not total:
        return float("nan")
    shares = counts[counts > 0] / total
    return float(max(0.0, -(shares * np.log2(shares)).sum()))


def normalised_entropy(counts: Array, experts: int) -> float:
    """Entropy over log2 of ``experts``: 1 is uniform. NaN for one expert, which leaves no choice."""
    return entropy(counts) / np.log2(experts) if experts > 1 else float("nan")


@dataclass(frozen=True, slots=True)
class Association:
    """How much layer A's choice says about layer B's. NaN where there are too few tokens, or no choice.

    ``plain``: plug-in mutual information, bits. ``normalised``: that adjusted for chance, 0 for independent routing and
    1 where it is all of min(H(A), H(B)); ``corrected``: the same in bits. ``cramers_v``: from chi², adjusted likewise.
    ``best_phi``: the mean over a of the largest correlation with any b.
    """

    plain: float
    corrected: float
    normalised: float
    cramers_v: float
    best_phi: float


def associate(joint: Array, first: Array, second: Array, tokens: int, top_k: tuple[int, int]) -> Association:
    """Association of two layers from [E, E] counts and their margins [E].

    Bias: for independent choices without replacement chi² of the random pair has the mean (E-k)(E'-k'), not
    (E-1)(E'-1), because the covariance of a uniform k-subset has eigenvalue k(E-k) / (E(E-1)); with k = 1 this is
    Miller and Madow's (1955) correction. Tokens count as independent, so dependence between tokens is not removed.
    Adjusted as (value - bias) / (largest - bias), as Vinh et al. (2010) do.
    """
    total = joint.sum()
    if not total:
        return Association(*[float("nan")] * 5)
    shares = joint / total
    expected = np.outer(shares.sum(axis=1), shares.sum(axis=0))
    there = shares > 0
    plain = float((shares[there] * np.log2(shares[there] / expected[there])).sum())
    valid = expected > 0
    chi = float((((shares - expected)[valid]) ** 2 / expected[valid]).sum())
    used = int((first > 0).sum()), int((second > 0).sum())
    freedom = max(0, used[0] - top_k[0]) * max(0, used[1] - top_k[1])
    bias = freedom / (tokens * top_k[0] * top_k[1])
    smaller, bias_bits = min(entropy(first), entropy(second)), bias / (2 * np.log(2))
    normalised = _adjusted(plain, bias_bits, smaller)
    v = np.sqrt(_adjusted(chi, bias, min(used) - 1))
    phi = correlation(joint, first, second, tokens)
    best = np.nanmax(np.where(np.isfinite(phi), phi, -1), axis=1)[first > 0]
    return Association(
        plain=max(0.0, plain),
        corrected=normalised * smaller,
        normalised=normalised,
        cramers_v=float(v),
        best_phi=float(best.mean()) if len(best) else float("nan"),
    )


def _adjusted(value: float, bias: float, largest: float) -> float:
    if largest <= bias:
        return float("nan")
    return float(min(1.0, max(0.0, (value - bias) / (largest - bias))))


def correlation(joint: Array, first: Array, second: Array, tokens: int) -> Array:
    """Pearson's phi [E, E] between "a is chosen" and "b is chosen"; NaN where one of them always or never is."""
    p, q = first / tokens, second / tokens
    spread = np.sqrt(np.outer(p * (1 - p), q * (1 - q)))
    phi = np.full(joint.shape, np.nan)
    np.divide(joint / tokens - np.outer(p, q), spread, out=phi, where=spread > 0)
    return phi


def conditional(joint: Array, first: Array) -> Array:
    """P(b chosen in one layer | a chosen in the other) [E, E]; rows sum to k; NaN where a was never chosen."""
    out = np.full(joint.shape, np.nan)
    np.divide(joint, first[:, None], out=out, where=first[:, None] > 0)
    return out
