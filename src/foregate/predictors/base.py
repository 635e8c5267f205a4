"""Defaults of the predictor interface, so that a method states only what is its own."""

from __future__ import annotations

from collections.abc import Sequence

from foregate.interfaces import Signals
from foregate.types import Moment, Prediction, PredictorCost, RoutingStep


class BasePredictor:
    """Asked after routing, costs nothing, remembers nothing, says nothing. See ``interfaces.Predictor``."""

    name = "base"
    signal = "nothing"
    moment = Moment.AFTER_ROUTING
    asks_routers = False
    router_scores = False
    """Whether its scores are on the scale of the router's own, so that weights follow from them."""
    source = ""
    """Where the method was published, for tables."""
    needs_file = False
    """Whether it must be fitted first; then ``from_file`` makes it, and its constructor is its own affair."""
    default_lookahead = 1

    def __init__(self, lookahead: int = 1) -> None:
        self.lookahead = lookahead

    def cost(self) -> PredictorCost:
        return PredictorCost()

    def reset(self) -> None:
        pass

    def observe(self, step: RoutingStep) -> None:
        pass

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        return ()
