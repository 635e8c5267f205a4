"""Training-free: the router of a layer, applied to what is known before that router runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from foregate.interfaces import Signals
from foregate.native.asking import WORTH_BEGINNING
from foregate.predictors.base import BasePredictor
from foregate.predictors.targets import targets
from foregate.types import Moment, Prediction, PredictorCost


class _Router(BasePredictor):
    """Ranks every layer from this one (or, after its routing, the next) to l+lookahead by its own router.

    The routers are fed with ``signal`` of layer l. The next token's layers are not asked: their input depends on a
    token that has not been chosen.
    """

    asks_routers = True
    router_scores = True

    def __init__(self, lookahead: int = 1) -> None:
        super().__init__(lookahead)
        self._cost = PredictorCost()
        self._named: int | None = None

    def name_at_most(self, count: int) -> None:
        """Whoever asks reads no more than the first ``count`` of a ranking: the rest need not be told."""
        self._named = max(1, count)

    def cost(self) -> PredictorCost:
        """Known once it has been asked; bytes as if the routers were in float32. It has no parameters of its own."""
        return self._cost

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        return [signals.best(target, self.signal, self._named) for target in self._ahead(signals)]

    def begin(self, signals: Signals) -> Callable[[], Sequence[Prediction]]:
        """See ``interfaces.Beginner``: of the first layer, while this thread is to see to the others."""
        ahead = self._ahead(signals)
        first, others = ahead[:1], ahead[1:]
        # Bytes are of float32, routers are bf16.
        if not first or self._cost.nbytes < 2 * (1 + len(others)) * WORTH_BEGINNING:
            return partial(self.predict, signals)
        end = signals.begin_best(first[0], self.signal, self._named)

        def told() -> Sequence[Prediction]:
            try:
                rest = [signals.best(target, self.signal, self._named) for target in others]
            finally:
                nearest = end()
            return [nearest, *rest]

        return told

    def _ahead(self, signals: Signals) -> Sequence[int]:
        known = targets(self, signals.layer, signals.layers)
        ahead = range(known.start, min(known.stop, signals.layers))
        if ahead and not self._cost.flops:
            numbers = len(signals.hidden(self.signal)) * sum(signals.experts[target] for target in ahead)
            self._cost = PredictorCost(2 * numbers, 4 * numbers)
        return ahead


class StaleGate(_Router):
    """The next router on this layer's router input, as FATE, mixtral-offloading, AdapMoE and HOBBIT do."""

    name = "stale-gate"
    signal = "router_input"
    source = "FATE, mixtral-offloading, AdapMoE, HOBBIT"


class NextGate(_Router):
    """The next router on Norm_{l+1}(r_l), the residual after attention through the *next* layer's norm.

    The plain signal s_l of "speculating experts" (quasi-hidden state without default vectors).
    """

    name = "next-gate"
    signal = "residual"
    source = "speculating experts, plain signal"


class PreAttentionGate(_Router):
    """This layer's router on the input of this layer's attention: covers layer 0, and the window is the attention.

    The training-free form of pre-attention prediction; a lookahead of 1 and more asks later routers the same.
    """

    name = "pre-attention-gate"
    signal = "pre_attention"
    moment = Moment.BEFORE_ATTENTION
    default_lookahead = 0
    source = "pre-attention prediction, without training"


class FreshGate(_Router):
    """Control: this layer's router on its own input, moments before it runs. Must name exactly what is chosen."""

    name = "fresh-gate"
    signal = "router_input"
    moment = Moment.AFTER_ATTENTION
    default_lookahead = 0
    source = "control: 100 %"
