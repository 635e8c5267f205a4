"""A choice that was told and is not kept yet: as a rule a kernel reads it where it lies, and Python copies nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod

from foregate.interfaces import Signals
from foregate.predictors.base import BasePredictor
from foregate.types import RoutingStep

Choice = tuple[int | None, int | None, int]
NOWHERE: Choice = None, None, 0
"""Where a choice lies that has been kept already."""


class PendingChoice(BasePredictor, ABC):
    """Subclasses say how a choice is kept (``_keep``), and ask for ``_choice`` where they predict. They may note that a
    token begins (``_begin_token``)."""

    _pending: RoutingStep | None = None
    """What was told last and is not kept yet."""

    def reset(self) -> None:
        super().reset()
        self._pending = None

    def observe(self, step: RoutingStep) -> None:
        # Not on to ``super()``, on purpose: ``_keep`` sees to that, if at all.
        if self._pending is not None:
            self._keep(self._pending)
        self._pending = step
        if step.layer == 0:
            self._begin_token()

    def _begin_token(self) -> None:
        """What the last token chose is kept, what this one chooses is not."""

    def _settle(self) -> None:
        """Keep what waits for it."""
        step, self._pending = self._pending, None
        if step is not None:
            self._keep(step)

    def _choice(self, signals: Signals, count: int | None = None) -> Choice:
        """Where a kernel finds the experts (int64) and weights (float32) that this layer chose for one token, and how
        many; ``NOWHERE`` if that has been kept instead, as when there are not ``count`` of them."""
        step, self._pending = self._pending, None
        if step is None:
            return NOWHERE
        rows, found = step.experts.shape
        if step.layer == signals.layer and rows == 1 and count in (None, found):
            places = signals.choice_of(step)
            if places is not None:
                return *places, found
        self._keep(step)
        return NOWHERE

    @abstractmethod
    def _keep(self, step: RoutingStep) -> None:
        """Note what ``step`` has told. Not called for a choice that was handed to a kernel: it is lost with a question
        that has begun and is dropped."""
