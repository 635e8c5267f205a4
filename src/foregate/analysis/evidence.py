"""Scores of the experts of a later layer from the counts of the train prompts. All smoothing is here.

Shapes: T tokens, E experts, k chosen. ``chosen`` is the multi-hot choice [T, E] of one layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.pairs import PairCounts, as_float

Array = NDArray[Any]


class Evidence:
    """What train prompts say. Popularity is computed once; the rest per pair of layers, from the counts."""

    def __init__(self, train: PairCounts) -> None:
        self._train = train
        layers = train.shape.layers
        self.popularity = np.stack([_popularity(train, layer) for layer in range(layers)])
        """P(b) [L, E], smoothed by half a token; experts that do not exist have 0."""

    def lift(self, layer: int, later: int) -> Array:
        """P(b | a) / P(b) [E, E] = (tokens with both + 1) / (tokens with a x P(b) + 1): observed over expected."""
        expected = np.outer(self._train.chosen(layer), self.popularity[later])
        return np.asarray((self._train.pair(layer, later) + 1.0) / (expected + 1), dtype=np.float32)

    def markov(self, chosen: Array, lift: Array, later: int) -> Array:
        """The sum over the chosen a of P(b | a), [T, E]."""
        return np.asarray(chosen @ (lift * self.popularity[later].astype(np.float32)))

    def support(self, chosen: Array, lift: Array, layer: int, later: int) -> Array:
        """Naive Bayes: what the choice in ``layer`` adds to log P(b), the sum of its shrunk log lifts, [T, E].

        Shrunk by reliability (empirical Bayes, normal approximation): a log count has variance v = 1 / (count + 1); t²
        is what the log lifts of this pair of layers vary beyond that; the factor is t² / (t² + v). So layers that do
        not depend on each other add nothing, and a pair that train prompts happen not to have is no proof.
        """
        evidence = np.log(lift)
        noise = 1 / (self._train.pair(layer, later) + 1.0)
        weight = np.outer(self._train.chosen(layer), self.popularity[later])
        beyond = max(0.0, float((weight * (evidence**2 - noise)).sum() / max(weight.sum(), 1e-9)))
        return np.asarray(chosen @ (evidence * (beyond / (beyond + noise))).astype(np.float32))

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
