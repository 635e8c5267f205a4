"""Training-free: the router of a later layer, applied to what this layer knows already."""

from __future__ import annotations

from collections.abc import Sequence

from foregate.interfaces import Signals
from foregate.predictors.base import BasePredictor
from foregate.types import Prediction


class _LaterRouter(BasePredictor):
    """Ranks layers l+1 … l+lookahead by their own routers, fed with ``signal`` of layer l."""

    asks_routers = True

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        last = min(signals.layer + self.lookahead, signals.layers - 1)
        return [self._rank(signals, target) for target in range(signals.layer + 1, last + 1)]

    def _rank(self, signals: Signals, target: int) -> Prediction:
        experts, scores = signals.rank(target, self.signal)
        return Prediction(target, tuple(experts.tolist()), tuple(scores.tolist()))


class StaleGate(_LaterRouter):
    """The next router on this layer's router input, as FATE, mixtral-offloading, AdapMoE and HOBBIT do."""

    name = "stale-gate"
    signal = "router_input"


class NextGate(_LaterRouter):
    """The next router on Norm_{l+1}(r_l), the residual after attention through the *next* layer's norm.

    The plain signal s_l of "speculating experts" (quasi-hidden state without default vectors).
    """

    name = "next-gate"
    signal = "residual"
