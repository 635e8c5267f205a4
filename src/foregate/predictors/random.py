"""Control: garbage on purpose. Costs reads and must change nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foregate.interfaces import Signals
from foregate.predictors.base import BasePredictor
from foregate.types import Prediction


class RandomExperts(BasePredictor):
    """Seeded random ranking of every layer ahead; expert ids that do not exist are among them, as garbage has it."""

    name = "random"
    signal = "a random generator"
    source = "control: garbage"

    def __init__(self, lookahead: int = 1, seed: int = 0) -> None:
        super().__init__(lookahead)
        self._seed = seed
        self._random = np.random.default_rng(seed)

    def reset(self) -> None:
        self._random = np.random.default_rng(self._seed)

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        last = min(signals.layer + self.lookahead, signals.layers - 1)
        return [self._garbage(target, signals.top_k) for target in range(signals.layer + 1, last + 1)]

    def _garbage(self, layer: int, top_k: int) -> Prediction:
        experts = self._random.integers(-1, 16 * top_k, size=4 * top_k).tolist()
        unique = tuple(dict.fromkeys(experts))
        return Prediction(layer, unique, (0.0,) * len(unique))
