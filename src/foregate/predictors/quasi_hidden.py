"""The next router on a guess of its input: the residual, plus what the chosen experts give on average.

Shapes: L MoE layers, E experts, D hidden, k experts chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foregate.interfaces import Signals
from foregate.predictors.file import Artifact
from foregate.predictors.fitted import FittedPredictor, last_token, ranked
from foregate.predictors.targets import targets
from foregate.types import Prediction, PredictorCost, RoutingStep


class QuasiHidden(FittedPredictor):
    """q_l = Norm_{l+1}(r_l + s_l + sum_k w_k dv_{l,e_k}), fed to the router of layer l+1.

    Array ``experts`` [L, E, D]: default vectors dv, the mean output of an expert over the calibration tokens that were
    routed to it. Array ``rest`` [L, D]: s_l, the mean of whatever else the MoE block adds (shared experts); zero where
    there is nothing else. Later layers are asked with the same guess through their own norm.
    """

    name = "quasi-hidden"
    signal = "residual, routing of this layer"
    asks_routers = True
    router_scores = True
    source = "speculating experts (quasi-hidden state)"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        layers, hidden = self.model.layers, self.model.hidden_size
        self._vectors = np.asarray(artifact.array("experts", (layers, self.width, hidden)), np.float32)
        self._rest = np.asarray(artifact.array("rest", (layers, hidden)), np.float32)
        self._added: NDArray[np.float32] | None = None

    def cost(self) -> PredictorCost:
        hidden, experts = self.model.hidden_size, self.width
        guess = hidden * (self.model.top_k + 1)
        return PredictorCost(
            2 * (guess + self.lookahead * hidden * experts),
            4 * (guess + self.lookahead * hidden * experts),
            self.parameters,
        )

    def reset(self) -> None:
        self._added = None

    def observe(self, step: RoutingStep) -> None:
        if len(step.experts) > 1:
            return
        chosen, weights = last_token(step, self.model.experts[step.layer])
        self._added = weights @ self._vectors[step.layer][chosen] + self._rest[step.layer]

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        if self._added is None:
            return ()
        guess = signals.hidden("residual").copy()
        guess[: len(self._added)] += self._added
        ahead = [target for target in targets(self, signals.layer, signals.layers) if target < signals.layers]
        return [ranked(target, signals.scores(target, signals.normed(target, guess))) for target in ahead]
