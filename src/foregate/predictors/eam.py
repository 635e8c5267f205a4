"""Expert-activation matrices: the request seen before that most resembles this one says what comes (MoE-Infinity).

Shapes: N stored requests, L MoE layers, E experts, k experts chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foregate.interfaces import Signals
from foregate.predictors.file import Artifact
from foregate.predictors.fitted import FittedPredictor, last_token
from foregate.predictors.targets import targets
from foregate.types import Prediction, PredictorCost, RoutingStep

REQUEST, TOKEN = "request", "token"
SCOPES = (REQUEST, TOKEN)
"""What is compared with the stored requests: all tokens of this one so far, or the layers of this token so far."""


class ExpertActivation(FittedPredictor):
    """Array ``library`` [N, L, E]: how often each expert was used in a stored request, each layer summing to 1.

    The match is the largest mean, over the layers observed, of the cosine between this request's row and the stored
    one's. Scores are the match's shares, less with distance: 1 - (i - l) / L for layer i seen from layer l.
    Option ``scope``: see ``SCOPES``.
    """

    name = "eam"
    signal = "routing of this request so far"
    source = "MoE-Infinity"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        layers = self.model.layers
        library = np.asarray(artifact.array("library", (None, layers, self.width)), np.float32)
        self._scope = artifact.option("scope", str)
        lengths = np.linalg.norm(library, axis=2, keepdims=True)
        # [L, E, N]: the column of an expert is contiguous, so that an observation adds k rows of N numbers
        self._unit = np.ascontiguousarray(np.transpose(library / np.maximum(lengths, 1e-12), (1, 2, 0)))
        order = np.argsort(-library, axis=2, kind="stable")
        self._order, self._sorted = order, np.take_along_axis(library, order, axis=2)
        self._counts = np.zeros((layers, self.width), np.float32)
        self._dots = np.zeros((layers, library.shape[0]), np.float32)
        self._cosines = np.zeros_like(self._dots)
        self._likeness = np.zeros(library.shape[0], np.float32)

    def cost(self) -> PredictorCost:
        numbers = self._likeness.size * (self.model.top_k + 3)
        return PredictorCost(numbers, 4 * numbers, self.parameters)

    def reset(self) -> None:
        for values in (self._counts, self._dots, self._cosines, self._likeness):
            values[...] = 0

    def observe(self, step: RoutingStep) -> None:
        layer = step.layer
        if self._scope == TOKEN:
            if layer == 0:
                self._likeness[:] = 0
            chosen, _ = last_token(step, self.model.experts[layer])
            self._likeness += self._unit[layer][chosen].sum(axis=0) / max(len(chosen), 1) ** 0.5
            return
        for expert, times in zip(*_counted(step.experts, self.model.experts[layer]), strict=True):
            self._counts[layer, expert] += times
            self._dots[layer] += times * self._unit[layer, expert]
        length = max(float(np.linalg.norm(self._counts[layer])), 1e-12)
        cosines = self._dots[layer] / length
        self._likeness += cosines - self._cosines[layer]
        self._cosines[layer] = cosines

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        match = int(self._likeness.argmax())
        return [self._of(match, target, signals.layer) for target in targets(self, signals.layer, signals.layers)]

    def _of(self, match: int, target: int, layer: int) -> Prediction:
        there = target % self.model.layers
        experts = self.model.experts[there]
        near = 1 - (target - layer) / self.model.layers
        order = tuple(self._order[match, there, :experts].tolist())
        return Prediction(target, order, tuple((near * self._sorted[match, there, :experts]).tolist()))


def _counted(experts: NDArray[np.int64], there: int) -> tuple[list[int], list[int]]:
    """Experts of [T, k] of which there are ``there``, and how often each was chosen."""
    flat = experts.ravel()
    if len(experts) == 1:
        chosen = [expert for expert in flat.tolist() if 0 <= expert < there]
        return chosen, [1] * len(chosen)
    found, times = np.unique(flat[(flat >= 0) & (flat < there)], return_counts=True)
    return found.tolist(), times.tolist()
