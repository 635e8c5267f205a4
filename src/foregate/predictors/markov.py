"""P(expert of layer l+h | experts of layer l), from counts: the conditional tables of the routing studies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foregate.interfaces import Signals
from foregate.predictors.file import Artifact
from foregate.predictors.fitted import FittedPredictor, last_token
from foregate.predictors.targets import targets
from foregate.types import Prediction, PredictorCost, RoutingStep


class Markov(FittedPredictor):
    """Array ``transition`` [H, L, E, E]: of tokens whose layer l chose the row's expert, the share whose layer l+h
    chose the column's, for hop h = 1 … H; l+h from L on is the next token's. Experts of one token are averaged.
    """

    name = "markov"
    signal = "routing of this layer"
    source = "cross-layer conditional probabilities"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        shape = (None, self.model.layers, self.width, self.width)
        self._transition = np.asarray(artifact.array("transition", shape), np.float32)
        self._chosen: NDArray[np.int64] = np.zeros(0, np.int64)

    def cost(self) -> PredictorCost:
        numbers = self.lookahead * self.model.top_k * self.width
        return PredictorCost(numbers, 4 * numbers, self.parameters)

    def reset(self) -> None:
        self._chosen = np.zeros(0, np.int64)

    def observe(self, step: RoutingStep) -> None:
        self._chosen, _ = last_token(step, self.model.experts[step.layer])

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        if not len(self._chosen):
            return ()
        ahead = targets(self, signals.layer, signals.layers)[: len(self._transition)]
        rows = self._transition[: len(ahead), signals.layer].take(self._chosen, axis=1)
        return self.rank_all(ahead, rows.sum(axis=1) / len(self._chosen))
