"""What follows the experts of a layer in a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from foregate.engine.clock import Clock
from foregate.experts.compute import End, Ended, Weights, begun_experts_of
from foregate.native import kernels
from foregate.native.decoder_layer import Call, DecoderLayer, Gone


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
    """What comes after the experts of one token: ``kernel`` mixes what they gave, and ``then``. That is one call where
    the next layer is compiled too, and one with the end of the experts where ``kernel`` had begun them all (``begun``,
    by bits)."""

    __slots__ = ("_asked", "_begun", "_clock", "_following", "_kernel", "_routed", "_then")

    def __init__(self, kernel: DecoderLayer, then: Following, begun: int, clock: Clock) -> None:
        self._kernel, self._then, self._begun, self._clock = kernel, then, begun, clock
        self._following, self._asked = then.prepared(), False
        self._routed: bool | None = None
        """What the next layer has said."""

    def begin(self, module: nn.Module, held: Sequence[Weights], rows: Sequence[int]) -> End:
        """``begun_experts_of``, whose end goes on at once where these are all."""
        self._asked = True
        end = begun_experts_of(self._kernel, module, held, rows, begun=self._begun)
        if self._following is None or len(rows) < len(self._kernel.choice.parts):
            return end
        return partial(self._end, end, self._following)

    def _end(self, end: End, following: Call) -> Ended:
        kernel, residents = self._kernel, self._kernel.residents
        if residents is not None and self._begun == (1 << len(kernel.choice.parts)) - 1:
            gone = kernel.go_on(residents.number, following)
            if gone is not None:
                return self._ended(gone)
        computed = end().computed
        return self._go_on(following)._replace(computed=computed)

    def _go_on(self, following: Call) -> Ended:
        gone = self._kernel.go_on(0, following)
        assert gone is not None
        return self._ended(gone)

    def _ended(self, gone: Gone) -> Ended:
        self._routed = gone.routed
        return Ended(gone.computed, beyond=gone.layer, other=gone.mix)

    def __call__(self) -> None:
        if self._begun and not self._asked:
            kernels.drop_begun_experts()
        if self._following is None:
            self._kernel.mix()
            self._then()
            return
        if self._routed is None:
            self._clock.ended(self._clock.now, partial(self._go_on, self._following))
            assert self._routed is not None
        self._then.begun(self._routed)
