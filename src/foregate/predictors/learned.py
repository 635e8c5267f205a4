"""What predictors that were trained by gradients share: targets up to the trained lookahead, the routing seen last.

Shapes: L MoE layers, E experts of the widest layer, H hops (the trained lookahead), k experts chosen.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from foregate.errors import ConfigError
from foregate.interfaces import Signals
from foregate.native.predict import Stage
from foregate.native.products import Products
from foregate.predictors.file import Artifact
from foregate.predictors.fitted import NOBODY, FittedPredictor
from foregate.predictors.targets import targets
from foregate.types import Prediction, PredictorCost, RoutingStep

Floats = NDArray[np.float32]
L = TypeVar("L", bound="LearnedPredictor")


class LearnedPredictor(FittedPredictor):
    """Subclasses compute scores of the layers 1 … H, or 1 … A, after the one at which they are asked."""

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        """Raises ConfigError for a ``lookahead`` beyond the trained one, PredictorError for arrays that do not fit."""
        super().__init__(artifact, lookahead)
        if lookahead > artifact.lookahead:
            raise ConfigError(f"lookahead {lookahead}: predictor {self.name!r} was trained for {artifact.lookahead}")
        self.layers = self.model.layers
        self.hidden_size = self.model.hidden_size
        self.hops = artifact.lookahead
        self.asked = max(1, min(lookahead, self.hops))
        """Of the hops, those that are asked for."""
        self._artifact = artifact

    @classmethod
    def from_file(cls: type[L], artifact: Artifact, lookahead: int) -> L:
        """See ``FittedPredictor``. What the file held is let go: it is kept in the form in which it is used."""
        made = super().from_file(artifact, lookahead)
        del made._artifact
        return made

    def floats(self, name: str, *shape: int | None) -> Floats:
        """Array ``name``, float32. Raises PredictorError unless it has ``shape`` (None: any)."""
        return np.ascontiguousarray(self._artifact.array(name, shape), np.float32)

    def linear(self, name: str, outputs: int, inputs: int, activation: str = "relu", *, asked: bool = False) -> Stage:
        """Arrays ``name``_weight [N, K] and _bias [N], of all layers; of N = H E only what is ``asked`` for."""
        weight, bias = self.floats(f"{name}_weight", outputs, inputs), self.floats(f"{name}_bias", outputs)
        rows = self.asked * self.width if asked else outputs
        return Stage(Products(weight[None, :rows]), bias[None, :rows], activation)

    def told(self, signals: Signals, name: str) -> Floats:
        """Hidden state ``name`` [D], of an inflated model the values that the original has."""
        return signals.hidden(name)[: self.hidden_size]

    def ranked(self, signals: Signals, scores: Floats) -> list[Prediction]:
        """``scores`` [H, E] of the layers after this one, as predictions up to the lookahead."""
        here = signals.layer
        return [self.rank(target, scores[target - here - 1]) for target in targets(self, here, self.layers)]

    def multiplied(self, numbers: int, nbytes: int | None = None) -> PredictorCost:
        """The cost of matrix-vector products with ``numbers`` weights of ``nbytes`` in all; None: they are float32."""
        return PredictorCost(2 * numbers, 4 * numbers if nbytes is None else nbytes, self.parameters)


class RoutedPredictor(LearnedPredictor):
    """Keeps what every layer chose last: rows up to the present layer are of this token, later ones of the last."""

    def __init__(self, artifact: Artifact, lookahead: int, before: int = 0) -> None:
        """With so many rows ``before`` that of layer 0, in which nothing is ever chosen."""
        super().__init__(artifact, lookahead)
        self.before = before
        self.ids = np.full((before + self.layers, self.model.top_k), NOBODY, np.int64)
        """Chosen experts, [before + L, k], and ``NOBODY``; of more than the model's top-k the first are taken."""

    def reset(self) -> None:
        self.ids[:] = NOBODY

    def observe(self, step: RoutingStep) -> None:
        chosen, row = step.experts[-1], self.ids[self.before + step.layer]
        if len(chosen) == len(row):
            row[:] = chosen
        else:
            row[:] = NOBODY
            row[: len(chosen)] = chosen[: len(row)]
        there = self.model.experts[step.layer]
        if there < self.width:  # what the widest layer has not, nobody reads
            row[row >= there] = NOBODY

    def of_layer(self, layer: int) -> NDArray[np.int64]:
        """What ``layer`` chose, without what is no expert of it."""
        ids = self.ids[self.before + layer]
        real: NDArray[np.int64] = ids[(ids >= 0) & (ids < self.width)]
        return real
