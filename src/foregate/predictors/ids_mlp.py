"""DuoServe's predictor: a small network on the chosen ids, the popularity of the later layer, and the affinity to it.

Shapes: L MoE layers, E experts, H hops.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foregate.interfaces import Signals
from foregate.predictors.activations import relu
from foregate.predictors.file import Artifact
from foregate.predictors.learned import RoutedPredictor
from foregate.types import Prediction, PredictorCost


class IdsMlp(RoutedPredictor):
    """Arrays ``popularity`` [L, E] and ``affinity`` [H, L, E, E] are counts of the training data."""

    name = "ids-mlp"
    signal = "routing of this layer"
    source = "DuoServe"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        layers, hops, experts = self.layers, self.hops, self.width
        popularity = self.floats("popularity", layers, experts)
        self._affinity = self.floats("affinity", hops, layers, experts, experts)
        first = self.floats("first_weight", None, experts * (1 + 2 * hops) + layers)
        size = len(first)
        ends = experts * (1 + hops)
        self._first = np.ascontiguousarray(first[:, :ends])
        ahead = np.concatenate([np.roll(popularity, -hop, axis=0) for hop in range(1, hops + 1)], axis=1)
        fixed = np.concatenate([ahead, np.eye(layers, dtype=np.float32)], axis=1)
        # Popularity and layer depend on the layer alone: their part of the first product is known beforehand.
        self._fixed = fixed @ first[:, ends:].T + self.floats("first_bias", size)
        self._second, self._second_bias = self.floats("second_weight", size, size), self.floats("second_bias", size)
        self._third = self.floats("third_weight", hops * experts, size)
        self._third_bias = self.floats("third_bias", hops * experts)

    def cost(self) -> PredictorCost:
        counted = self.hops * self.model.top_k * self.width
        return self.multiplied(self._first.size + self._second.size + self._third.size + counted)

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        if not len(self.ids):
            return ()
        layer = signals.layer
        affinity = self._affinity[:, layer][:, self.ids].sum(axis=1) / np.float32(len(self.ids))
        known = np.concatenate([self.chosen[layer], affinity.ravel()])
        hidden = relu(self._first @ known + self._fixed[layer])
        hidden = relu(self._second @ hidden + self._second_bias)
        return self.ranked(signals, (self._third @ hidden + self._third_bias).reshape(self.hops, self.width))
