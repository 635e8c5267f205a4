"""DuoServe's predictor: a small network on the chosen ids, the popularity of the later layer, and the affinity to it.

Shapes: L MoE layers, E experts, H hops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from foregate.interfaces import Signals
from foregate.native.asking import LayerKernel
from foregate.native.predict import Given, Picked
from foregate.native.products import Rows
from foregate.predictors.activations import relu
from foregate.predictors.file import Artifact
from foregate.predictors.learned import Floats, RoutedPredictor
from foregate.predictors.network import NetworkPredictor
from foregate.types import Prediction, PredictorCost


class IdsMlp(RoutedPredictor, NetworkPredictor):
    """Arrays ``popularity`` [L, E] and ``affinity`` [H, L, E, E] are counts of the training data."""

    name = "ids-mlp"
    signal = "routing of this layer"
    source = "DuoServe"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        layers, hops, experts = self.layers, self.hops, self.width
        popularity = self.floats("popularity", layers, experts)
        affinity = self.floats("affinity", hops, layers, experts, experts)
        first = self.floats("first_weight", None, experts * (1 + 2 * hops) + layers)
        size = len(first)
        ends = experts * (1 + hops)
        # An expert adds its own column and, by its share of the choice, what its affinities make of theirs.
        own, top_k = first[:, :experts].T, np.float32(self.model.top_k)
        near = affinity.transpose(1, 2, 0, 3).reshape(layers, experts, hops * experts) @ first[:, experts:ends].T
        self._first = Rows(own + near / top_k)
        self._own = np.ascontiguousarray(own)
        ahead = np.concatenate([np.roll(popularity, -hop, axis=0) for hop in range(1, hops + 1)], axis=1)
        fixed = np.concatenate([ahead, np.eye(layers, dtype=np.float32)], axis=1)
        # Popularity and layer depend on the layer alone: their part of the first product is known beforehand.
        self._fixed = fixed @ first[:, ends:].T + self.floats("first_bias", size)
        self._second = self.linear("second", size, size)
        self._third = self.linear("third", hops * experts, size, asked=True)

    def cost(self) -> PredictorCost:
        parts, picked = (self._second.products, self._third.products), self.model.top_k
        numbers = picked * self._first.columns + sum(part.size for part in parts)
        return self.multiplied(numbers, picked * self._first.row_bytes + sum(part.nbytes for part in parts))

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        return super().predict(signals) if self._usual(signals) else self._computed(signals)

    def begin(self, signals: Signals) -> Callable[[], Sequence[Prediction]]:
        """See ``interfaces.Beginner``."""
        return super().begin(signals) if self._usual(signals) else partial(self._computed, signals)

    def _usual(self, signals: Signals) -> bool:
        """Whether as many were chosen as the kernel takes for granted."""
        ids: list[int] = self.ids[signals.layer].tolist()
        return min(ids) >= 0 and max(ids) < self.width

    def _network(self) -> LayerKernel | None:
        return self._compiled(self._second, self._third, rows=self._first, start=self._fixed)

    def _given(self, signals: Signals) -> tuple[Given, Picked | None]:
        return None, (self.ids[signals.layer], None)

    def _scores(self, signals: Signals) -> Floats:
        chosen = self.of_layer(signals.layer)
        own = self._own[chosen].sum(axis=0)
        near = self._first.of(signals.layer, chosen).sum(axis=0) - own
        inner = own + near * (self.model.top_k / max(1, len(chosen))) + self._fixed[signals.layer]
        return self._third(0, relu(self._second(0, relu(inner)))).reshape(self.asked, self.width)
