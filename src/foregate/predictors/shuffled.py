"""Control: the right answer under wrong names. Whatever reads it as better than chance is broken."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foregate.interfaces import Signals
from foregate.predictors.oracle import Oracle
from foregate.types import Prediction


class Shuffled(Oracle):
    """The oracle with the experts of every layer renamed by a fixed, seeded permutation.

    It keeps the rhythm of the true routing (repeats, how many experts a layer uses) and none of its content.
    """

    name = "shuffled"
    signal = "a recording of the same run, experts permuted"
    source = "control: chance"

    def __init__(self, lookahead: int = 1, seed: int = 0) -> None:
        super().__init__(lookahead)
        self._seed = seed

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        return [self._renamed(true, signals) for true in super().predict(signals)]

    def _renamed(self, true: Prediction, signals: Signals) -> Prediction:
        layer = true.layer % signals.layers
        names = np.random.default_rng((self._seed, layer)).permutation(signals.experts[layer])
        return Prediction(true.layer, tuple(names[list(true.experts)].tolist()), true.scores)
