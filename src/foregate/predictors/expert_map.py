"""Stored router probabilities of single tokens, matched by the input first and by the routing then (fMoE, FineMoE).

Shapes: M stored maps, L MoE layers, E experts, D hidden, k experts chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foregate.interfaces import Signals
from foregate.native.products import Products, Rows
from foregate.predictors.file import Artifact
from foregate.predictors.fitted import FittedPredictor
from foregate.predictors.targets import targets
from foregate.types import Prediction, PredictorCost, RoutingStep


class ExpertMap(FittedPredictor):
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
        # [L, E, M]: an observation adds k contiguous rows of M numbers
        self._columns = Rows(self.none_padded(np.transpose(maps, (1, 2, 0)).copy()), exact=True)
        self._lengths = np.sqrt(np.maximum(np.cumsum((maps**2).sum(axis=2), axis=1), 1e-12)).T.copy()
        order = np.argsort(-maps, axis=2, kind="stable")
        self._order, self._sorted = order, np.take_along_axis(maps, order, axis=2)
        self._sums = np.cumsum(self._sorted, axis=2)
        self._dots = np.zeros(len(maps), np.float32)
        self._cosines = np.zeros_like(self._dots)
        self._square = 0.0
        self._seen = -1
        self._by_input: tuple[int, float] | None = None

    def cost(self) -> PredictorCost:
        numbers = self._dots.size * (self.model.top_k + 2)
        return PredictorCost(numbers, 4 * numbers, self.parameters)

    def reset(self) -> None:
        self._seen = -1

    def observe(self, step: RoutingStep) -> None:
        layer = step.layer
        if layer <= self._seen or self._seen < 0:
            self._dots[:] = 0
            self._square, self._by_input = 0.0, None
        self._seen = layer
        chosen, weights, there = step.experts[-1], step.weights[-1], self.model.experts[layer]
        self._columns.add(layer, chosen, weights, self._dots)
        pairs = zip(chosen.tolist(), weights.tolist(), strict=True)  # sooner than numpy, when caches are cold
        self._square += sum([weight * weight for expert, weight in pairs if 0 <= expert < there])

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        match, score = self._match(signals)
        return [self._kept(match, score, target) for target in targets(self, signals.layer, signals.layers)]

    def _match(self, signals: Signals) -> tuple[int, float]:
        """The stored token that is nearest, and the cosine to it."""
        if signals.layer < self._semantic:
            if self._by_input is None:
                self._by_input = self._nearest_input(signals)
            return self._by_input
        cosines = np.divide(self._dots, self._lengths[signals.layer], out=self._cosines)
        match = int(cosines.argmax())
        return match, float(cosines[match]) / max(self._square**0.5, 1e-12)

    def _nearest_input(self, signals: Signals) -> tuple[int, float]:
        # an inflated model's vectors begin with the original's
        value = signals.hidden("pre_attention")[: self.model.hidden_size]
        cosines = self._inputs(0, value)
        match = int(cosines.argmax())
        return match, float(cosines[match]) / max(float(np.linalg.norm(value)), 1e-12)

    def _kept(self, match: int, score: float, target: int) -> Prediction:
        there = target % self.model.layers
        most = count = min(self.named, self.model.experts[there])
        if most > self.model.top_k:
            wanted = 1 - min(max(score, 0.0), 1.0)
            count = min(max(int(self._sums[match, there].searchsorted(wanted)) + 1, self.model.top_k), most)
        order = tuple(self._order[match, there, :count].tolist())
        return Prediction(target, order, tuple(self._sorted[match, there, :count].tolist()))
