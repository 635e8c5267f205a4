"""The next router on a guess of its input: the residual, plus what the chosen experts give on average.

Shapes: L MoE layers, E experts, D hidden, k experts chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from foregate.interfaces import Signals
from foregate.native.products import Rows
from foregate.native.shift import Shift
from foregate.predictors.file import Artifact
from foregate.predictors.fitted import NOBODY, FittedPredictor, ranked
from foregate.predictors.targets import targets
from foregate.types import Prediction, PredictorCost, RoutingStep

Asked = Callable[[], Prediction | None] | None


class QuasiHidden(FittedPredictor):
    """q_l = Norm_{l+1}(r_l + s_l + sum_k w_k dv_{l,e_k}), fed to the router of layer l+1.

    Array ``experts`` [L, E, D]: default vectors dv, the mean output of an expert over the calibration tokens that were
    routed to it. Array ``rest`` [L, D]: s_l, the mean of whatever else the MoE block adds (shared experts); zero where
    there is nothing else. Later layers are asked with the same guess through their own norm.
    Of a choice of more than the model's top-k experts the first are taken.
    """

    name = "quasi-hidden"
    signal = "residual, routing of this layer"
    asks_routers = True
    router_scores = True
    source = "speculating experts (quasi-hidden state)"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        layers, hidden = self.model.layers, self.model.hidden_size
        self._vectors = Rows(
            self.none_padded(np.array(artifact.array("experts", (layers, self.width, hidden)), np.float32))
        )
        self._rest = np.ascontiguousarray(artifact.array("rest", (layers, hidden)), np.float32)
        self._ids = np.full(self.model.top_k, NOBODY, np.int64)
        self._weights = np.zeros(self.model.top_k, np.float32)
        self._own = self._ids.ctypes.data, self._weights.ctypes.data
        every = [targets(self, layer, layers) for layer in range(layers)]
        self._ahead = [range(ahead.start, min(ahead.stop, layers)) for ahead in every]
        self._step: RoutingStep | None = None
        """What the last layer chose."""
        self._shift = Shift(self._vectors, self._rest, self._ids, self._weights) if self._vectors.given else None

    def cost(self) -> PredictorCost:
        hidden, experts = self.model.hidden_size, self.width
        guess = hidden * (self.model.top_k + 1)
        flops = 2 * (guess + self.lookahead * hidden * experts)
        picked = self.model.top_k * self._vectors.row_bytes
        return PredictorCost(flops, picked + 4 * hidden * (1 + self.lookahead * experts), self.parameters)

    def reset(self) -> None:
        self._step = None

    def observe(self, step: RoutingStep) -> None:
        self._step = step

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        return self.begin(signals)()

    def begin(self, signals: Signals) -> Callable[[], Sequence[Prediction]]:
        """See ``interfaces.Beginner``: of the nearest layer, while this thread sees to the others."""
        step, ahead = self._step, self._ahead[signals.layer]
        if step is None or not ahead:
            return tuple
        rows, found = step.experts.shape
        if rows > 1:
            return tuple
        if self._shift is not None:
            # As a rule a kernel finds what was chosen where it lies: nobody needs to copy it.
            places = signals.choice_of(step) if found == self.model.top_k else None
            self._shift.read(signals.layer, *(self._copied(step) if places is None else places))
        return partial(self._told, signals, ahead, self._asked(signals, ahead[0]))

    def _copied(self, step: RoutingStep) -> tuple[int, int]:
        """Where a copy of what ``step`` chose lies."""
        chosen, most = step.experts[0], self.model.top_k
        self._ids[:] = NOBODY
        self._ids[: len(chosen)], self._weights[: len(chosen)] = chosen[:most], step.weights[0, :most]
        return self._own

    def _told(self, signals: Signals, ahead: range, first: Asked) -> Sequence[Prediction]:
        try:
            others = [self._end(signals, target, self._asked(signals, target)) for target in ahead[1:]]
        finally:  # whatever happens, another thread may be at it
            nearest = self._end(signals, ahead[0], first)
        return [nearest, *others]

    def _asked(self, signals: Signals, target: int) -> Asked:
        if self._shift is None:
            return None
        return signals.begin_shifted(target, self._shift, self.named)

    def _end(self, signals: Signals, target: int, asked: Asked) -> Prediction:
        return (None if asked is None else asked()) or self._guess(signals, target)

    def _guess(self, signals: Signals, target: int) -> Prediction:
        """What a kernel would tell."""
        layer, step, most = signals.layer, self._step, self.model.top_k
        assert step is not None
        ids, weights = step.experts[0, :most], step.weights[0, :most]
        real = (ids >= 0) & (ids < self.model.experts[layer])
        guess = signals.hidden("residual").copy()
        guess[: self.model.hidden_size] += weights[real] @ self._vectors.of(layer, ids[real]) + self._rest[layer]
        told = ranked(target, signals.scores(target, signals.normed(target, guess)))
        return Prediction(target, told.experts[: self.named], told.scores[: self.named])
