"""Per-layer loops that do not wait for, or do not read, what an exact one would. Only where ``lossy`` is set.

Prompts are always served exactly: the owner sets ``lossy`` for decode steps alone. No torch here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from time import perf_counter, perf_counter_ns

from foregate.events import ReadSubmitted, Use
from foregate.experts.cache import ExpertCache
from foregate.experts.paired_transfer import PairedTransfer
from foregate.interfaces import Ticket, Transfer
from foregate.prefetch.pipeline import Compute, Pipeline
from foregate.prefetch.prefetcher import Prefetcher
from foregate.types import ExpertKey


class LossyPipeline(Pipeline):
    """``affected``: experts of the layer served last that were left out, or computed in low precision."""

    def __init__(self, cache: ExpertCache, transfer: Transfer, prefetcher: Prefetcher) -> None:
        super().__init__(cache, transfer, prefetcher)
        self.lossy = False
        self.affected: set[int] = set()

    def settle(self) -> None:
        """The sequence ended: nothing stays in flight."""


class SkippingPipeline(LossyPipeline):
    """Leaves out every expert whose read has not arrived once all others of the layer are computed.

    Its read goes on, and the expert is resident for later tokens: otherwise a cold cache would stay cold.
    """

    def __init__(self, cache: ExpertCache, transfer: Transfer, prefetcher: Prefetcher) -> None:
        super().__init__(cache, transfer, prefetcher)
        self._landing: dict[ExpertKey, Ticket] = {}

    def _begin_decode(self) -> None:
        if self.lossy:
            self._collect()
            self.affected = set()
        else:
            self.settle()

    def _serve_absent(
        self, flight: dict[ExpertKey, Ticket], missing: deque[ExpertKey], compute: Compute, pinned: set[ExpertKey]
    ) -> None:
        if not self.lossy:
            super()._serve_absent(flight, missing, compute, pinned)
            return
        while (arrived := _first_done(flight)) is not None:
            self._land(arrived, flight, perf_counter())
            self._serve(arrived, compute, pinned)
        self._leave_out(flight, missing)

    def stream(
        self,
        layer: int,
        needed: Sequence[int],
        compute: Compute,
        ahead: Callable[[], None],
        keep: Collection[int] | None = None,
    ) -> None:
        """A prompt waits for everything, what an earlier step left out included."""
        self.settle()
        super().stream(layer, needed, compute, ahead, keep)

    def settle(self) -> None:
        """Wait until what was left out has arrived. Raises TransferError where a read has failed for good."""
        try:
            for ticket in list(self._landing.values()):
                self._transfer.wait(ticket)
                self._collect()
        finally:
            self._abandon(self._landing)

    def _take_present(self, key: ExpertKey, flight: dict[ExpertKey, Ticket]) -> bool:
        ticket = self._landing.pop(key, None)
        if ticket is None:
            return super()._take_present(key, flight)
        flight[key] = ticket
        self.stats.misses += 1
        self._tell_use(key, Use.MISS)
        return True

    def _leave_out(self, flight: dict[ExpertKey, Ticket], missing: deque[ExpertKey]) -> None:
        """``missing`` got no slot: earlier reads hold them."""
        self.stats.misses += len(missing)
        for key in missing:
            self._tell_use(key, Use.MISS)
        self.affected = {key.expert for key in (*flight, *missing)}
        self._landing.update(flight)
        flight.clear()

    def _collect(self) -> None:
        """What has arrived since becomes resident."""
        for key in [key for key, ticket in self._landing.items() if ticket.done]:
            ticket = self._landing[key]
            self._transfer.wait(ticket)
            self._prefetcher.tell_end(self._landing.pop(key))
            self._cache.commit(key)
            self._late.discard(key)


class LowPrecisionPipeline(LossyPipeline):
    """Reads a miss in low precision, uses it once and lets it go: what is resident stays exact.

    Exact experts come with the prompt and with what was predicted. A prediction that is late is waited for.
    """

    def __init__(self, cache: ExpertCache, transfer: PairedTransfer, prefetcher: Prefetcher) -> None:
        super().__init__(cache, transfer, prefetcher)
        self.low: set[ExpertKey] = set()
        """Keys whose slot holds, or will hold, the low precision."""
        self._paired = transfer

    def _begin_decode(self) -> None:
        self.affected = set()

    def _read(self, key: ExpertKey, slot: int, flight: dict[ExpertKey, Ticket]) -> None:
        if not self.lossy:
            super()._read(key, slot, flight)
            return
        self.stats.misses += 1
        self._tell_use(key, Use.MISS)
        flight[key] = self._paired.submit_low(key, slot)
        self.low.add(key)
        if self._events.on:
            self._events.emit(ReadSubmitted(perf_counter_ns(), key, False))

    def _serve(self, key: ExpertKey, compute: Compute, pinned: set[ExpertKey]) -> None:
        super()._serve(key, compute, pinned)
        if key in self.low:
            self.affected.add(key.expert)
            self.low.remove(key)
            self._cache.release(key)


def _first_done(flight: dict[ExpertKey, Ticket]) -> ExpertKey | None:
    return next((key for key, ticket in flight.items() if ticket.done), None)
