"""P(expert of layer l+h | experts of layer l), from counts: the conditional tables of the routing studies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from foregate.interfaces import Signals
from foregate.native.asking import LayerKernel
from foregate.native.predict import Floats, Given, Picked
from foregate.native.products import Rows
from foregate.predictors.file import Artifact
from foregate.predictors.fitted import last_token
from foregate.predictors.network import NetworkPredictor, shares_of
from foregate.types import Prediction, PredictorCost, RoutingStep


class Markov(NetworkPredictor):
    """Array ``transition`` [H, L, E, E]: of tokens whose layer l chose the row's expert, the share whose layer l+h
    chose the column's, for hop h = 1 … H; l+h from L on is the next token's. Experts of one token are averaged.
    """

    name = "markov"
    signal = "routing of this layer"
    source = "cross-layer conditional probabilities"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        shape = (None, self.model.layers, self.width, self.width)
        transition = np.asarray(artifact.array("transition", shape), np.float32)
        self.asked = min(lookahead, len(transition))
        # [L, E, A E]: what an expert says of all layers ahead lies in one place
        by_expert = transition[: self.asked].transpose(1, 2, 0, 3)
        self._rows = Rows(by_expert.reshape(self.model.layers, self.width, -1), exact=True)
        self._shares = shares_of(self.width)
        self._chosen: NDArray[np.int64] = np.zeros(0, np.int64)

    def cost(self) -> PredictorCost:
        numbers = self.asked * self.model.top_k * self.width
        return PredictorCost(numbers, 4 * numbers, self.parameters)

    def reset(self) -> None:
        self._chosen = np.zeros(0, np.int64)

    def observe(self, step: RoutingStep) -> None:
        self._chosen, _ = last_token(step, self.model.experts[step.layer])

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        return super().predict(signals) if len(self._chosen) else ()

    def begin(self, signals: Signals) -> Callable[[], Sequence[Prediction]]:
        """See ``interfaces.Beginner``."""
        return super().begin(signals) if len(self._chosen) else tuple

    def _network(self) -> LayerKernel | None:
        return self._compiled(rows=self._rows) if self.asked else None

    def _given(self, signals: Signals) -> tuple[Given, Picked | None]:
        return None, (self._chosen, self._shares[len(self._chosen)])

    def _scores(self, signals: Signals) -> Floats:
        rows = self._rows.of(signals.layer, self._chosen)
        return (self._shares[len(rows)] @ rows).reshape(self.asked, self.width)
