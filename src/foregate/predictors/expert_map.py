"""Stored router probabilities of single tokens, matched by the input first and by the routing then (fMoE, FineMoE).

Shapes: M stored maps, L MoE layers, E experts, D hidden, k experts chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foregate.interfaces import Signals
from foregate.native.products import Products, Rows
from foregate.predictors.file import Artifact
from foregate.predictors.stored import GIVEN, SQUARES, StoredPredictor
from foregate.types import Prediction, PredictorCost, RoutingStep


class ExpertMap(StoredPredictor):
    """Arrays ``maps`` [M, L, E], router probabilities of stored tokens, and ``inputs`` [M, D], what entered their
    first attention. Option ``semantic_layers``: layers up to which the input decides, not the routing observed.

    The routing observed is this token's chosen experts with their weights, not the whole distribution, which costs
    nothing to know. Of the match, experts are kept until their probabilities sum to 1 - score (the cosine of the
    match), and at least k.
    """

    name = "expert-map"
    signal = "pre_attention of the first layer, then routing of this token"
    source = "fMoE, FineMoE"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        layers, hidden = self.model.layers, self.model.hidden_size
        maps = np.asarray(artifact.array("maps", (None, layers, self.width)), np.float32)
        inputs = np.asarray(artifact.array("inputs", (len(maps), hidden)), np.float32)
        self._semantic = artifact.option("semantic_layers", int)
        self._inputs = Products((inputs / np.maximum(np.linalg.norm(inputs, axis=1, keepdims=True), 1e-12))[None])
        self._seen = -1
        self._by_input: int | None = None
        # [L, E, M]: a choice adds k contiguous rows of M numbers
        columns = Rows(self.none_padded(np.transpose(maps, (1, 2, 0)).copy()), exact=True)
        self._remember(maps, columns, np.sqrt(np.maximum(np.cumsum((maps**2).sum(axis=2), axis=1), 1e-12)).T.copy())

    def _least(self) -> int:
        return self.model.top_k

    def cost(self) -> PredictorCost:
        numbers = self._likeness.size * (self.model.top_k + 2)
        return PredictorCost(numbers, 4 * numbers, self.parameters)

    def reset(self) -> None:
        super().reset()
        self._seen = -1

    def observe(self, step: RoutingStep) -> None:
        super().observe(step)
        if step.layer <= self._seen or self._seen < 0:
            self._likeness[:] = 0
            self._known[:] = 0
            self._by_input = None
        self._seen = step.layer

    def _keep(self, step: RoutingStep) -> None:
        layer, chosen, weights = step.layer, step.experts[-1], step.weights[-1]
        self._columns.add(layer, chosen, weights, self._likeness)
        self._known[SQUARES] += np.square(weights[(chosen >= 0) & (chosen < self.model.experts[layer])]).sum()

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        if signals.layer >= self._semantic:
            return self._told(signals)
        if self._by_input is None:
            self._by_input, self._known[GIVEN] = self._nearest_input(signals)
        return self._told(signals, self._by_input)

    def _nearest_input(self, signals: Signals) -> tuple[int, float]:
        """The stored token whose input is nearest, and the cosine to it."""
        # an inflated model's vectors begin with the original's
        value = signals.hidden("pre_attention")[: self.model.hidden_size]
        cosines = self._inputs(0, value)
        match = int(cosines.argmax())
        return match, float(cosines[match]) / max(float(np.linalg.norm(value)), 1e-12)
