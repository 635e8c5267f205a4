"""Scores of the experts of a later layer from the counts of the train prompts. All smoothing is here.

Shapes: T tokens, E experts, k chosen. ``chosen`` is the multi-hot choice [T, E] of one layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.pairs import PairCounts, as_float

Array = NDArray[Any]
PSEUDO_TOKENS = 1.0
"""Weight of the popularity in P(b | a), in tokens that chose a."""


class Evidence:
    """What train prompts say. Popularity is computed once; the rest per pair of layers, from the counts."""

    def __init__(self, train: PairCounts) -> None:
        self._train = train
        layers = train.shape.layers
        self.popularity = np.stack([_popularity(train, layer) for layer in range(layers)])
        """P(b) [L, E], smoothed by half a token; experts that do not exist have 0."""

    def smoothed(self, layer: int, later: int) -> Array:
        """P(b | a) [E, E] = (tokens with both + P(b)) / (tokens with a + 1)."""
        joint, first = as_float(self._train.pair(layer, later)), as_float(self._train.chosen(layer))
        prior = self.popularity[later]
        shares = (joint + PSEUDO_TOKENS * prior) / (first[:, None] + PSEUDO_TOKENS)
        return np.asarray(shares, dtype=np.float32)

    def from_layer(self, chosen: Array, smoothed: Array) -> Array:
        """Markov: the sum over the chosen a of P(b | a), [T, E]."""
        return np.asarray(chosen @ smoothed)

    def support(self, chosen: Array, layer: int, later: int) -> Array:
        """What the experts chosen in ``layer`` add to log P(b): the sum of the lifts of the chosen a, [T, E]."""
        return np.asarray(chosen @ self._lift(layer, later))

    def _lift(self, layer: int, later: int) -> Array:
        """log P(b | a) / P(b) [E, E], shrunk towards 0 by its reliability (empirical Bayes, normal approximation).

        A log count has variance v = 1 / (count + 1); t² is what the lifts of this pair of layers vary beyond that; the
        factor is t² / (t² + v), so that a pair of layers without dependence adds nothing but its prior.
        """
        prior = self.popularity[later].astype(np.float32)
        smoothed = self.smoothed(layer, later)
        lift = np.log(np.divide(smoothed, prior, out=np.ones_like(smoothed), where=prior > 0))
        noise = 1 / (self._train.pair(layer, later) + 1.0)
        weight = np.outer(self._train.chosen(layer), prior)
        beyond = max(0.0, float((weight * (lift**2 - noise)).sum() / max(weight.sum(), 1e-9)))
        return np.asarray(lift * (beyond / (beyond + noise)), dtype=np.float32)

    def prior(self, later: int) -> Array:
        """log P(b) [E]; -inf for experts that do not exist."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.popularity[later]), dtype=np.float32)


def _popularity(train: PairCounts, layer: int) -> Array:
    size = train.shape.experts_per_layer[layer]
    shares = (as_float(train.chosen(layer)) + 0.5) / (train.tokens + 1)
    shares[size:] = 0
    return shares


def ranks(scores: Array, chosen: NDArray[np.int32]) -> NDArray[np.int32]:
    """Place (0 is best) of every chosen expert [T, k] among ``scores`` [T, E]; equal scores go by expert number."""
    number = np.arange(scores.shape[1])
    out = np.empty(chosen.shape, np.int32)
    for rank in range(chosen.shape[1]):
        expert = chosen[:, rank : rank + 1]
        own = np.take_along_axis(scores, expert.astype(np.intp), axis=1)
        out[:, rank] = (scores > own).sum(axis=1) + ((scores == own) & (number < expert)).sum(axis=1)
    return out
