"""What follows the experts of a layer in a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from foregate.experts.compute import End, Weights, begun_experts_of
from foregate.native import kernels
from foregate.native.decoder_layer import Call, DecoderLayer


class Following:
    """Begins when it is called; of this one, nothing does."""

    __slots__ = ()

    def __call__(self) -> None:
        """The output of the layer before is there."""

    def prepared(self) -> Call | None:
        """The compiled layer that can begin in its stead, without any Python in between; None where none can."""
        return None

    def begun(self, routed: bool) -> None:
        """That layer has begun, and said this."""


class AfterExperts:
    """What comes after the experts of one token: ``kernel`` mixes what they gave, and ``then``. Where all of them are
    there, that is one call with their end, or where ``kernel`` had not begun them all (``begun``, by bits) right after.
    """

    __slots__ = ("_begun", "_done", "_kernel", "_then")

    def __init__(self, kernel: DecoderLayer, then: Following, begun: int) -> None:
        self._kernel, self._then, self._begun, self._done = kernel, then, begun, False

    def begin(self, module: nn.Module, held: Sequence[Weights], rows: Sequence[int]) -> End:
        """As ``begun_experts_of``."""
        end = begun_experts_of(self._kernel, module, held, rows, begun=self._begun)
        return partial(self._end, end) if len(rows) == len(self._kernel.choice.parts) else end

    def _end(self, end: End) -> tuple[int, int]:
        following = self._then.prepared()
        if following is None:
            return end()
        made, computed = self._at_once(following), 0
        if made is None:
            computed, _ = end()
            made = self._kernel.go_on(0, following)
            assert made is not None
        before, beyond, routed = made
        self._done = True
        self._then.begun(routed)
        return computed + before, beyond

    def _at_once(self, following: Call) -> tuple[int, int, bool] | None:
        residents, everyone = self._kernel.residents, (1 << len(self._kernel.choice.parts)) - 1
        if residents is None or self._begun != everyone:
            return None
        return self._kernel.go_on(residents.number, following)

    def __call__(self) -> None:
        if self._done:
            return
        if self._begun:  # nothing to do, unless nobody has asked for them
            kernels.drop_begun_experts()
        self._kernel.mix()
        self._then()
