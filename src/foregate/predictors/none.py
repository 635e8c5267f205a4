"""The null predictor: says nothing, so nothing is read ahead. The baseline of every other one."""

from __future__ import annotations

from collections.abc import Sequence

from foregate.interfaces import Signals
from foregate.types import Prediction, RoutingStep


class NonePredictor:
    """Never predicts."""

    name = "none"

    def __init__(self, lookahead: int = 1) -> None:
        self.lookahead = lookahead

    def reset(self) -> None:
        pass

    def observe(self, step: RoutingStep) -> None:
        pass

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        return ()
