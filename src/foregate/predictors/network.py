"""What predictors share that a chain of matrices computes: one compiled call, or numpy.

Shapes: L MoE layers, E experts of the widest layer, A layers that are told of at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from foregate.interfaces import Signals
from foregate.native.asking import LayerKernel
from foregate.native.predict import Floats, NetworkKernel, Stage, available
from foregate.predictors.file import Artifact
from foregate.predictors.fitted import FittedPredictor
from foregate.predictors.targets import targets
from foregate.types import Prediction

N = TypeVar("N", bound="NetworkPredictor")


def shares_of(most: int) -> list[Floats]:
    """For each count up to ``most`` that many equal factors, whose sum is 1."""
    return [np.full(count, 1 / max(1, count), np.float32) for count in range(most + 1)]


class NetworkPredictor(FittedPredictor, ABC):
    """One whose scores a compiled network gives where there is one, begun early where that is worth it.

    Subclasses say what it is made of (``_network``), what it is given (``_given``), and what it computes (``_scores``).
    """

    asked: int
    """How many layers are told of at once, A."""
    _kernel: LayerKernel | None = None

    @classmethod
    def from_file(cls: type[N], artifact: Artifact, lookahead: int) -> N:
        """See ``FittedPredictor``; compiled where that is possible."""
        made = super().from_file(artifact, lookahead)
        made._compile()
        return made

    def name_at_most(self, count: int) -> None:
        super().name_at_most(count)
        self._compile()

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        kernel = self._kernel
        return self._computed(signals) if kernel is None else kernel(signals.layer, *self._given(signals))

    def begin(self, signals: Signals) -> Callable[[], Sequence[Prediction]]:
        """See ``interfaces.Beginner``."""
        kernel = self._kernel
        if kernel is None:
            return partial(self._computed, signals)
        return kernel.begin(signals.layer, *self._given(signals))

    def _computed(self, signals: Signals) -> Sequence[Prediction]:
        """The prediction by numpy."""
        pairs = zip(self._ahead(signals.layer), self._scores(signals), strict=False)
        whole, named = [self.rank(layer, scores) for layer, scores in pairs], self.named
        return [Prediction(layer, experts[:named], scores[:named]) for layer, experts, scores in whole]

    def _compile(self) -> None:
        """Anew where what is asked for has changed."""
        self._kernel = self._network() if available() else None

    @abstractmethod
    def _network(self) -> LayerKernel | None:
        """The kernel; None where the kernels cannot have what it is made of."""

    @abstractmethod
    def _given(self, signals: Signals) -> tuple[Any, ...]:
        """What the kernel is given, in its form."""

    @abstractmethod
    def _scores(self, signals: Signals) -> Floats:
        """What the kernel computes, [A, E]."""

    def _compiled(self, *stages: Stage, **more: Any) -> NetworkKernel | None:
        """The kernel of ``stages``, for the layers that are asked for."""
        if not all(stage.products.matrices for stage in stages):
            return None
        ahead = [self._ahead(layer) for layer in range(self.model.layers)]
        return NetworkKernel(stages, self.model.experts, ahead, self.asked, self.named, **more)

    def _ahead(self, layer: int) -> range:
        return targets(self, layer, self.model.layers)[: self.asked]
