"""What predictors that were trained by gradients share: targets up to the trained lookahead, the routing seen last.

Shapes: L MoE layers, E experts of the widest layer, H hops (the trained lookahead), k experts chosen.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from foregate.errors import ConfigError
from foregate.interfaces import Signals
from foregate.predictors.file import Artifact
from foregate.predictors.fitted import FittedPredictor, last_token
from foregate.predictors.targets import targets
from foregate.types import Prediction, PredictorCost, RoutingStep

Floats = NDArray[np.float32]
L = TypeVar("L", bound="LearnedPredictor")


class LearnedPredictor(FittedPredictor):
    """Subclasses compute scores [H, E] of the layers 1 … H after the one at which they are asked."""

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        """Raises ConfigError for a ``lookahead`` beyond the trained one, PredictorError for arrays that do not fit."""
        super().__init__(artifact, lookahead)
        if lookahead > artifact.lookahead:
            raise ConfigError(f"lookahead {lookahead}: predictor {self.name!r} was trained for {artifact.lookahead}")
        self.layers = self.model.layers
        self.hidden_size = self.model.hidden_size
        self.hops = artifact.lookahead
        self.named = self.width
        """Experts that a compiled prediction names, at most: see ``name_at_most``."""
        self._artifact = artifact

    @classmethod
    def from_file(cls: type[L], artifact: Artifact, lookahead: int) -> L:
        """See ``FittedPredictor``. What the file held is let go: it is kept in the form in which it is used."""
        made = super().from_file(artifact, lookahead)
        del made._artifact
        return made

    def name_at_most(self, count: int) -> None:
        """Whoever asks reads no more than the first ``count`` of a ranking: the rest need not be told."""
        self.named = min(max(1, count), self.width)

    def floats(self, name: str, *shape: int | None) -> Floats:
        """Array ``name``, float32. Raises PredictorError unless it has ``shape`` (None: any)."""
        return np.ascontiguousarray(self._artifact.array(name, shape), np.float32)

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

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        self.chosen = np.zeros((self.layers, self.width), np.float32)
        """1 where an expert was chosen, [L, E]."""
        self.ids: NDArray[np.int64] = np.zeros(0, np.int64)
        self.weights = np.zeros(0, np.float32)

    def reset(self) -> None:
        self.chosen[:] = 0
        self.ids, self.weights = np.zeros(0, np.int64), np.zeros(0, np.float32)

    def observe(self, step: RoutingStep) -> None:
        self.ids, self.weights = last_token(step, self.model.experts[step.layer])
        row = self.chosen[step.layer]
        row[:] = 0
        row[self.ids] = 1
