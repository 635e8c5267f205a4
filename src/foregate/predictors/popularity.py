"""The most frequent experts of each layer, whatever the token. The least that a method must beat."""

from __future__ import annotations

from collections.abc import Sequence

from foregate.interfaces import Signals
from foregate.predictors.file import Artifact
from foregate.predictors.fitted import FittedPredictor
from foregate.predictors.targets import targets
from foregate.types import Prediction


class Popularity(FittedPredictor):
    """Array ``popularity`` [L, E]: share of the training tokens that chose the expert. The order never changes."""

    name = "popularity"
    signal = "nothing: counts of the training traces"
    source = "baseline"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        table = artifact.array("popularity", (self.model.layers, self.width))
        self._ready = [self.rank(layer, scores) for layer, scores in enumerate(table)]

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        return [self._at(target) for target in targets(self, signals.layer, signals.layers)]

    def _at(self, target: int) -> Prediction:
        ready = self._ready[target % self.model.layers]
        return ready if target == ready.layer else Prediction(target, ready.experts, ready.scores)
