"""What predictors share that remember tokens or requests, and tell what the one used that is most like the present.

Shapes: M stored, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foregate.interfaces import Signals
from foregate.native.match import MOST_ALIKE, MatchKernel
from foregate.native.predict import Floats, available
from foregate.native.products import Rows
from foregate.predictors.fitted import FittedPredictor
from foregate.predictors.pending import PendingChoice
from foregate.predictors.targets import targets
from foregate.types import Prediction

SQUARES, GIVEN = 0, 1


class StoredPredictor(PendingChoice, FittedPredictor):
    """One compiled call keeps a choice that is pending and finds the match, where there is a compiler; else numpy does.

    Subclasses call ``_remember`` when they are made, and say how a choice is kept (``_keep``).
    """

    fading = False
    """Whether shares are less with distance."""
    _kernel: MatchKernel | None = None

    def _remember(self, used: Floats, columns: Rows, lengths: Floats | None = None) -> None:
        """``used`` [M, L, E]: what a stored one used, and how much. ``columns`` [L, E, M]: what a choice adds to
        the likeness; that divided by ``lengths`` [L, M] is compared."""
        order = np.argsort(-used, axis=2, kind="stable")
        self._shares = np.take_along_axis(used, order, axis=2)
        self._order, self._columns = order.astype(np.int32), columns
        self._inverse = None if lengths is None else np.float32(1) / lengths
        self._likeness = np.zeros(len(used), np.float32)
        self._known = np.zeros(2, np.float32)
        """Of the weights kept, the sum of squares (``SQUARES``); the likeness of a match that is given (``GIVEN``)."""
        self._compile()

    def _least(self) -> int:
        """Experts that are told at least; more, if the match is not good."""
        return self.width

    def name_at_most(self, count: int) -> None:
        super().name_at_most(count)
        self._compile()

    def _told(self, signals: Signals, match: int = MOST_ALIKE) -> Sequence[Prediction]:
        """What the stored ``match`` used, once the last choice is kept."""
        if self._kernel is not None:
            return self._kernel(signals.layer, *self._choice(signals), match)
        self._settle()
        score = float(self._known[GIVEN])
        if match == MOST_ALIKE:
            match, score = self._most_alike(signals.layer)
        return [
            self._kept(match, score, target, signals.layer) for target in targets(self, signals.layer, signals.layers)
        ]

    def _most_alike(self, layer: int) -> tuple[int, float]:
        values = self._likeness if self._inverse is None else self._likeness * self._inverse[layer]
        match = int(values.argmax())
        return match, float(values[match]) / max(float(self._known[SQUARES]) ** 0.5, 1e-12)

    def _kept(self, match: int, score: float, target: int, layer: int) -> Prediction:
        there = target % self.model.layers
        most = count = min(self.named, self.model.experts[there])
        shares = self._shares[match, there]
        if most > self._least():
            wanted = 1 - min(max(score, 0.0), 1.0)
            count = min(max(int(np.cumsum(shares).searchsorted(wanted)) + 1, self._least()), most)
        near = 1 - (target - layer) / self.model.layers if self.fading else 1
        order = tuple(self._order[match, there, :count].tolist())
        return Prediction(target, order, tuple((near * shares[:count]).tolist()))

    def _compile(self) -> None:
        """Anew where what is asked for has changed."""
        ahead = [list(targets(self, layer, self.model.layers)) for layer in range(self.model.layers)]
        self._kernel = None
        if not available() or not self._columns.given or not all(ahead):
            return
        self._kernel = MatchKernel(
            self._columns, self._likeness, self._inverse, self._known, self._order, self._shares,
            self.model.experts, ahead, self.named, self._least(), fading=self.fading,
        )  # fmt: skip
