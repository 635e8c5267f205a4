"""A small network on the next-gate signal that was trained towards the later router's scores, and its hybrid.

Shapes: L MoE layers, E experts, D hidden, H hops, F width of the network.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foregate.interfaces import Signals
from foregate.native.products import Products
from foregate.predictors.activations import silu, unit_rms
from foregate.predictors.file import Artifact
from foregate.predictors.learned import Floats, LearnedPredictor
from foregate.types import Prediction, PredictorCost


class Estimator(LearnedPredictor):
    """``first`` [F, H D + embedding] on the residual through each later layer's norm and a layer embedding."""

    name = "estimator"
    signal = "residual"
    router_scores = True
    source = "speculating experts (estimator)"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        layers, hops = self.layers, self.hops
        self._norm = self.floats("norm", layers, hops, self.hidden_size)
        embedding = self.floats("layer", layers, None)
        signal = hops * self.hidden_size
        first = self.floats("first_weight", None, signal + embedding.shape[1])
        self._first = Products(first[None, :, :signal])
        self._place = embedding @ first[:, signal:].T + self.floats("first_bias", len(first))
        self._second = Products(self.floats("second_weight", hops * self.width, len(first))[None])
        self._second_bias = self.floats("second_bias", hops * self.width)

    def cost(self) -> PredictorCost:
        return self.multiplied(self._first.size + self._second.size, self._first.nbytes + self._second.nbytes)

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        return self.ranked(signals, self._estimate(signals.layer, unit_rms(self.told(signals, "residual"))))

    def _estimate(self, layer: int, unit: Floats) -> Floats:
        """Scores [H, E] from the unit residual [D]."""
        np.multiply(unit, self._norm[layer], out=self._first.x.reshape(self._norm[layer].shape))
        inner = self._first.of(0)
        inner += self._place[layer]
        scores = self._second(0, silu(inner))
        scores += self._second_bias
        return scores.reshape(self.hops, self.width)


class Hybrid(Estimator):
    """The estimator where ``estimated`` [L, H] is 1; elsewhere a copy of the later router on the plain signal."""

    name = "hybrid"
    source = "speculating experts (hybrid)"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        layers, hops = self.layers, self.hops
        self._estimated = artifact.array("estimated", (layers, hops), "iu").astype(bool)
        router = self.floats("router", layers, hops, self.width, self.hidden_size)
        self._router = Products(router.reshape(layers, hops * self.width, self.hidden_size))
        self._bias = self.floats("router_bias", layers, hops, self.width)

    def cost(self) -> PredictorCost:
        estimated, copied = float(self._estimated.any(axis=1).mean()), float((~self._estimated).mean())
        numbers = round((self._first.size + self._second.size) * estimated + self._router.size * copied)
        return self.multiplied(numbers, numbers * self._first.nbytes // self._first.size)

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        layer = signals.layer
        unit = unit_rms(self.told(signals, "residual"))
        estimated = self._estimated[layer]
        scores = None
        if not estimated.all():
            scores = self._bias[layer] + self._router(layer, unit).reshape(self.hops, self.width)
        if estimated.any():
            guess = self._estimate(layer, unit)
            scores = guess if scores is None else np.where(estimated[:, None], guess, scores)
        assert scores is not None
        return self.ranked(signals, scores)
