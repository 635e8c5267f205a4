"""What this layer chose for the last token, again."""

from __future__ import annotations

from collections.abc import Sequence

from foregate.interfaces import Signals
from foregate.predictors.base import BasePredictor
from foregate.predictors.targets import targets
from foregate.types import Prediction, RoutingStep


class PreviousToken(BasePredictor):
    """Repeats the last choice of every layer, in its order; knows nothing of other experts."""

    name = "previous-token"
    signal = "routing of the previous token"
    source = "baseline"

    def __init__(self, lookahead: int = 1) -> None:
        super().__init__(lookahead)
        self._last: dict[int, tuple[tuple[int, ...], tuple[float, ...]]] = {}

    def reset(self) -> None:
        self._last.clear()

    def observe(self, step: RoutingStep) -> None:
        self._last[step.layer] = tuple(step.experts[-1].tolist()), tuple(step.weights[-1].tolist())

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        ahead = targets(self, signals.layer, signals.layers)
        known = [(target, self._last.get(target % signals.layers)) for target in ahead]
        return [Prediction(target, *last) for target, last in known if last is not None]
