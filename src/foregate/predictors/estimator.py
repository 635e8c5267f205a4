"""A small network on the next-gate signal that was trained towards the later router's scores, and its hybrid.

Shapes: L MoE layers, E experts, D hidden, H hops, F width of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from foregate.interfaces import Signals
from foregate.native.asking import LayerKernel
from foregate.native.predict import Given, Picked, Stage, available
from foregate.native.products import Products
from foregate.predictors.activations import silu, unit_rms
from foregate.predictors.file import Artifact
from foregate.predictors.learned import Floats, LearnedPredictor
from foregate.predictors.network import NetworkPredictor
from foregate.types import Prediction, PredictorCost


class Estimator(LearnedPredictor, NetworkPredictor):
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
        place = embedding @ first[:, signal:].T + self.floats("first_bias", len(first))
        self._first = Stage(Products(first[None, :, :signal]), place, "linear")
        self._second = self.linear("second", hops * self.width, len(first), "silu", asked=True)

    def cost(self) -> PredictorCost:
        first, second = self._first.products, self._second.products
        return self.multiplied(first.size + second.size, first.nbytes + second.nbytes)

    def _network(self) -> LayerKernel | None:
        return self._compiled(self._first, self._second, norms=self._norm)

    def _given(self, signals: Signals) -> tuple[Given, Picked | None]:
        where = signals.addresses("residual", numbers=self.hidden_size)
        return (self.told(signals, "residual") if where is None else (where[0][0], where[1])), None

    def _scores(self, signals: Signals) -> Floats:
        return self._estimate(signals.layer, unit_rms(self.told(signals, "residual")))

    def _estimate(self, layer: int, unit: Floats) -> Floats:
        """Scores [A, E] from the unit residual [D]."""
        inner = self._first(layer, (unit * self._norm[layer]).ravel())
        return self._second(0, silu(inner)).reshape(self.asked, self.width)


class Hybrid(Estimator):
    """The estimator where ``estimated`` [L, H] is 1; elsewhere a copy of the later router on the plain signal."""

    name = "hybrid"
    source = "speculating experts (hybrid)"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        layers, hops = self.layers, self.hops
        asked = self.asked
        self._estimated = artifact.array("estimated", (layers, hops), "iu").astype(bool)[:, :asked]
        router = self.floats("router", layers, hops, self.width, self.hidden_size)[:, :asked]
        bias = self.floats("router_bias", layers, hops, self.width)[:, :asked]
        self._router = Stage(
            Products(router.reshape(layers, asked * self.width, self.hidden_size)),
            np.ascontiguousarray(bias.reshape(layers, -1)),
            "linear",
        )
        self._as_it_is = np.ones((layers, 1, self.hidden_size), np.float32)

    def cost(self) -> PredictorCost:
        estimated, copied = float(self._estimated.any(axis=1).mean()), float((~self._estimated).any(axis=1).mean())
        first, second, router = self._first.products, self._second.products, self._router.products
        numbers = round((first.size + second.size) * estimated + router.size * copied)
        return self.multiplied(numbers, round((first.nbytes + second.nbytes) * estimated + router.nbytes * copied))

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        self._choose(signals.layer)
        return super().predict(signals)

    def begin(self, signals: Signals) -> Callable[[], Sequence[Prediction]]:
        """See ``interfaces.Beginner``."""
        self._choose(signals.layer)
        return super().begin(signals)

    def _compile(self) -> None:
        """The kernel of every layer: one of the two, or None where hops need both."""
        super()._compile()
        copied = self._compiled(self._router, norms=self._as_it_is) if available() else None
        self._kernels = [
            self._kernel if of_all.all() else None if of_all.any() else copied for of_all in self._estimated
        ]

    def _choose(self, layer: int) -> None:
        self._kernel = self._kernels[layer]

    def _scores(self, signals: Signals) -> Floats:
        layer = signals.layer
        unit = unit_rms(self.told(signals, "residual"))
        estimated = self._estimated[layer]
        if estimated.all():
            return self._estimate(layer, unit)
        copied = self._router(layer, unit).reshape(self.asked, self.width)
        if not estimated.any():
            return copied
        guessed: Floats = np.where(estimated[:, None], self._estimate(layer, unit), copied)
        return guessed
