"""Expert-activation matrices: the request seen before that most resembles this one says what comes (MoE-Infinity).

Shapes: N stored requests, L MoE layers, E experts, k experts chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foregate.interfaces import Signals
from foregate.native.products import Rows
from foregate.predictors.file import Artifact
from foregate.predictors.fitted import last_token
from foregate.predictors.stored import StoredPredictor
from foregate.types import Prediction, PredictorCost, RoutingStep

REQUEST, TOKEN = "request", "token"
SCOPES = (REQUEST, TOKEN)
"""What is compared with the stored requests: all tokens of this one so far, or the layers of this token so far."""


class ExpertActivation(StoredPredictor):
    """Array ``library`` [N, L, E]: how often each expert was used in a stored request, each layer summing to 1.

    The match is the largest mean, over the layers observed, of the cosine between this request's row and the stored
    one's. Scores are the match's shares, less with distance: 1 - (i - l) / L for layer i seen from layer l.
    Option ``scope``: see ``SCOPES``.
    """

    name = "eam"
    fading = True
    signal = "routing of this request so far"
    source = "MoE-Infinity"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        layers = self.model.layers
        library = np.asarray(artifact.array("library", (None, layers, self.width)), np.float32)
        self._scope = artifact.option("scope", str)
        lengths = np.linalg.norm(library, axis=2, keepdims=True)
        self._squares = [0.0] * layers
        self._shares_of = [np.full(count, max(1, count) ** -0.5, np.float32) for count in range(self.width + 1)]
        """What each of so many experts adds to the cosine with their choice."""
        self._counts = np.zeros((layers, self.width), np.float32)
        self._dots = np.zeros((layers, library.shape[0]), np.float32)
        self._cosines = np.zeros_like(self._dots)
        # [L, E, N]: the column of an expert is contiguous, so that an observation adds k rows of N numbers
        unit = library / np.maximum(lengths, 1e-12)
        self._remember(library, Rows(np.transpose(unit, (1, 2, 0)).copy(), exact=True))

    def cost(self) -> PredictorCost:
        numbers = self._likeness.size * (self.model.top_k + 3)
        return PredictorCost(numbers, 4 * numbers, self.parameters)

    def reset(self) -> None:
        super().reset()
        for values in (self._counts, self._dots, self._cosines, self._likeness):
            values[...] = 0
        self._squares = [0.0] * self.model.layers

    def _keep(self, step: RoutingStep) -> None:
        layer = step.layer
        if self._scope == TOKEN:
            if layer == 0:
                self._likeness[:] = 0
            chosen = step.experts[-1]
            self._columns.add(layer, chosen, self._shares_of[len(chosen)], self._likeness)
            return
        found, times = _counted(step, self.model.experts[layer])
        counts, dots, last = self._counts[layer], self._dots[layer], self._cosines[layer]
        before = counts[found]
        self._squares[layer] += float(times @ (2 * before + times))
        counts[found] = before + times
        self._columns.add(layer, found, times, dots)
        self._likeness -= last
        np.divide(dots, max(self._squares[layer] ** 0.5, 1e-12), out=last)
        self._likeness += last

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        # What a choice adds is not its weights, so that numpy keeps it: here, when demand reads are under way already.
        self._settle()
        return self._told(signals)


def _counted(step: RoutingStep, experts: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Those of ``experts`` that were chosen, and how often each."""
    if len(step.experts) == 1:
        chosen, _ = last_token(step, experts)
        return chosen, np.ones(len(chosen), np.float32)
    flat = step.experts.ravel()
    found, times = np.unique(flat[(flat >= 0) & (flat < experts)], return_counts=True)
    return found, times.astype(np.float32)
