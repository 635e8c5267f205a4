"""What every predictor that is read from a file shares. No torch.

Shapes: L MoE layers, E experts of a layer (arrays are padded to the widest), k experts chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from foregate.predictors.base import BasePredictor
from foregate.predictors.file import Artifact
from foregate.types import Prediction, RoutingStep

NOBODY = -1
"""Where no expert was chosen."""

P = TypeVar("P", bound="FittedPredictor")


class FittedPredictor(BasePredictor):
    """Made by ``from_file``; subclasses take their arrays from ``artifact`` and know their own ``parameters``."""

    needs_file = True

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        """Raises PredictorError where an array or an option is not what the method needs."""
        super().__init__(lookahead)
        self.model = artifact.model
        self.width = max(artifact.model.experts)
        self.named = self.width
        """Experts that a compiled prediction names, at most: see ``name_at_most``."""
        self.parameters = sum(array.size for array in artifact.arrays.values())

    @classmethod
    def from_file(cls: type[P], artifact: Artifact, lookahead: int) -> P:
        """The predictor in ``artifact``. Raises PredictorError."""
        return cls(artifact, lookahead)

    def name_at_most(self, count: int) -> None:
        """Whoever asks reads no more than the first ``count`` of a ranking: the rest need not be told."""
        self.named = min(max(1, count), self.width)

    def none_padded(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """``rows`` [L, E, …], of which those are zero that stand for no expert: a choice may name one all the same."""
        for layer, there in enumerate(self.model.experts):
            rows[layer, there:] = 0
        return rows

    def rank_all(self, layers: Sequence[int], scores: NDArray[np.float32]) -> list[Prediction]:
        """Experts of each of ``layers`` by its row of ``scores`` [len(layers), E], no padded one above a real one."""
        order = np.argsort(-scores, axis=1, kind="stable")
        rows = zip(layers, order.tolist(), np.take_along_axis(scores, order, axis=1).tolist(), strict=True)
        made = []
        for layer, experts, values in rows:
            there = self.model.experts[layer % self.model.layers]
            made.append(Prediction(layer, tuple(experts[:there]), tuple(values[:there])))
        return made

    def rank(self, layer: int, scores: NDArray[np.float32]) -> Prediction:
        """Experts of ``layer`` (L and more: the next token's) by ``scores`` [E]."""
        return ranked(layer, scores[: self.model.experts[layer % self.model.layers]])


def ranked(layer: int, scores: NDArray[np.float32]) -> Prediction:
    """All experts of ``layer`` by ``scores`` [E], largest first; the lower number where they tie."""
    experts, values = (-scores).argsort(kind="stable").tolist(), scores.tolist()
    return Prediction(layer, tuple(experts), tuple([values[expert] for expert in experts]))


def last_token(step: RoutingStep, experts: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Experts that the last token of ``step`` goes to, of ``experts`` there are, and their weights."""
    chosen, weights = step.experts[-1], step.weights[-1]
    ids = chosen.tolist()
    if ids and min(ids) >= 0 and max(ids) < experts:
        return chosen, weights
    real = (chosen >= 0) & (chosen < experts)
    return chosen[real], weights[real]
