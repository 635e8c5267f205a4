"""The per-layer loop: routing known → slots, reads, waits, and ``compute`` called once for every needed expert.

No torch here: the caller's ``compute(expert, slot)`` does the arithmetic, so a simulator can drive the same loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from time import perf_counter, perf_counter_ns, sleep

from foregate.errors import IntegrityError
from foregate.events import ExpertUsed, Part, ReadSubmitted, TimeSpent, Use, ns
from foregate.experts.cache import ExpertCache, SlotState
from foregate.interfaces import Ticket, Transfer
from foregate.prefetch.prefetcher import SETTLE_S, Prefetcher
from foregate.types import ExpertKey, StepStats

Compute = Callable[[int, int], None]
"""``compute(expert, slot)``: the expert's weights are in ``slot`` until this returns."""

Together = Callable[[Sequence[int], Sequence[int]], Callable[[], float]]
"""``compute`` of several experts at once: ``together(experts, slots)`` begins; what it returns ends that, and tells for
how many seconds any was being computed. Where something breaks in between it is not called: the caller of ``decode``
lets go. When it is called they may have lost their slots already, which keep their bytes until it has returned."""


_BLOCKED_S = 20e-6
"""Shorter waits are calls that found that a read had ended; since when, they do not say."""


class Pipeline:
    """Serves the experts of one MoE layer after another from cache, staging and store. One thread owns it."""

    def __init__(self, cache: ExpertCache, transfer: Transfer, prefetcher: Prefetcher) -> None:
        self.stats = StepStats()
        self._cache = cache
        self._transfer = transfer
        self._prefetcher = prefetcher
        self._events = prefetcher.events
        self._late: set[ExpertKey] = set()
        self._waited_at = 0
        """When the last wait ended that was one."""
        self.read_beside: tuple[int, int, int] | None = None
        """Of the last decode step's layer: from when to when reads that it waited for were under way, and for how long
        it waited, ns."""

    def decode(
        self,
        layer: int,
        needed: Sequence[int],
        compute: Compute,
        predict: Callable[[], Callable[[], None] | None],
        together: Together | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        """A step of few tokens: resident experts first, then whichever read arrives next, and ``then`` at once.

        ``predict`` runs once the demand reads are submitted, so that speculation queues behind them. What it returns,
        if anything, is called while resident experts are being computed; those go through ``together`` if it is given
        and nobody wants to know how long each took. Experts beyond the cache's room are served in waves. Raises
        TransferError when a read has failed for good.
        """
        self._begin_decode()
        keys = [ExpertKey(layer, expert) for expert in needed]
        flight: dict[ExpertKey, Ticket] = {}
        pinned = set(keys)
        self._cache.pin(keys)
        try:
            ready, missing = self._classify(keys, flight)
            if missing:
                self._request(missing, flight)
            since, waited, self.read_beside = perf_counter_ns() if flight else 0, self.stats.stall_s, None
            self._serve_all(ready, compute, together, partial(self._look_ahead, layer, predict()), pinned)
            if flight or missing:
                self._serve_absent(flight, missing, compute, pinned)
            if then is not None:
                then()
            if since:
                self.read_beside = since, self._waited_at, int(1e9 * (self.stats.stall_s - waited))
        finally:
            self._abandon(flight)
            if pinned:
                self._cache.unpin(pinned)

    def stream(
        self,
        layer: int,
        needed: Sequence[int],
        compute: Compute,
        ahead: Callable[[], None],
        keep: Collection[int] | None = None,
    ) -> None:
        """A step of many tokens: experts in ascending order, as many reads ahead as the cache has room for.

        ``ahead`` runs once every read of this layer is submitted: the disk's next work is the next layer's. Experts
        outside ``keep`` (None: all are kept) make room first, once computed.
        """
        keys = [ExpertKey(layer, expert) for expert in sorted(needed)]
        flight: dict[ExpertKey, Ticket] = {}
        pinned: set[ExpertKey] = set()
        waiting = deque(keys)
        kept = self._keep_residents(keys)
        # What was read ahead in vain must not take the disk from what is needed.
        self._prefetcher.expire(layer, but=set(keys))
        try:
            for key in keys:
                while waiting and self._acquire(waiting[0], flight, pinned):
                    waiting.popleft()
                    if not waiting:
                        ahead()
                self._arrive(key, flight)
                if key in kept:
                    kept.remove(key)
                    self._cache.unpin([key])
                self._serve(key, compute, pinned)
                if keep is not None and key.expert not in keep:
                    self._cache.spend(key)
        finally:
            self._abandon(flight)
            self._cache.unpin([*pinned, *kept])
        self._prefetcher.expire(layer)

    def _serve_absent(
        self, flight: dict[ExpertKey, Ticket], missing: deque[ExpertKey], compute: Compute, pinned: set[ExpertKey]
    ) -> None:
        """What ``decode`` does about experts that were not there; only called where there are any."""
        while flight or missing:
            self._request(missing, flight)
            self._serve(self._next_arrival(flight, missing), compute, pinned)

    def _begin_decode(self) -> None:
        """A step of few tokens comes to a layer: for loops that keep something between layers."""

    # Deciding what is where

    def _keep_residents(self, keys: Iterable[ExpertKey]) -> set[ExpertKey]:
        """Pin what this layer has already, so that its own reads do not evict it; half of the slots stay free."""
        resident = [key for key in keys if self._cache.state(key) is SlotState.RESIDENT]
        kept = resident[: self._cache.quota // 2]
        self._cache.pin(kept)
        return set(kept)

    def _classify(
        self, keys: Iterable[ExpertKey], flight: dict[ExpertKey, Ticket]
    ) -> tuple[list[ExpertKey], deque[ExpertKey]]:
        ready: list[ExpertKey] = []
        missing: deque[ExpertKey] = deque()
        for key in keys:
            if not self._take_present(key, flight):
                missing.append(key)
            elif key not in flight:
                ready.append(key)
        return ready, missing

    def _take_present(self, key: ExpertKey, flight: dict[ExpertKey, Ticket]) -> bool:
        """True if ``key`` is resident, staged, or on its way (then its ticket is in ``flight``)."""
        if self._cache.hit(key):
            self.stats.hits += 1
            if self._events.on:
                self._tell_use(key, Use.HIT)
            return True
        ticket = self._prefetcher.claim(key)
        if ticket is None:
            return False
        if ticket.ok:
            self._cache.adopt(key)
            self.stats.hits += 1
            self._tell_use(key, Use.STAGED_HIT)
            return True
        self._cache.promote(key)
        self._transfer.promote(ticket)
        flight[key] = ticket
        self._late.add(key)
        self.stats.misses += 1
        self.stats.late += 1
        self._tell_use(key, Use.LATE)
        return True

    def _request(self, missing: deque[ExpertKey], flight: dict[ExpertKey, Ticket]) -> None:
        while missing:
            slot = self._cache.reserve(missing[0])
            if slot is None:
                return
            self._read(missing.popleft(), slot, flight)

    def _acquire(self, key: ExpertKey, flight: dict[ExpertKey, Ticket], pinned: set[ExpertKey]) -> bool:
        """Pin ``key`` and make sure that it is present or on its way; False (unpinned) when there is no room yet."""
        self._cache.pin([key])
        if not self._take_present(key, flight):
            slot = self._cache.reserve(key)
            if slot is None:
                self._cache.unpin([key])
                return False
            self._read(key, slot, flight)
        pinned.add(key)
        return True

    def _read(self, key: ExpertKey, slot: int, flight: dict[ExpertKey, Ticket]) -> None:
        self.stats.misses += 1
        self._tell_use(key, Use.MISS)
        if self._cache.squeezed_out(key):
            self._prefetcher.controller.saw_ghost()
        flight[key] = self._transfer.submit(key, slot, speculative=False)
        if self._events.on:
            self._events.emit(ReadSubmitted(perf_counter_ns(), key, False))

    def _tell_use(self, key: ExpertKey, how: Use) -> None:
        if self._events.on:
            self._events.emit(ExpertUsed(perf_counter_ns(), key, how))

    # Waiting

    def _next_arrival(self, flight: dict[ExpertKey, Ticket], missing: deque[ExpertKey]) -> ExpertKey:
        """The next expert that has arrived."""
        if not flight:
            raise IntegrityError(f"no room for {missing[0]} although nothing is pinned or in flight")
        started = perf_counter()
        ticket = self._transfer.wait_any(list(flight.values()))
        self._land(ticket.key, flight, started)
        return ticket.key

    def _arrive(self, key: ExpertKey, flight: dict[ExpertKey, Ticket]) -> None:
        if key in flight:
            self._land(key, flight, perf_counter())

    def _land(self, key: ExpertKey, flight: dict[ExpertKey, Ticket], started: float) -> None:
        """Wait for ``key`` and make it resident. Raises TransferError when its read has failed for good."""
        try:
            self._transfer.wait(flight[key])
        finally:
            self._count_stall(key, started, perf_counter())
        self._prefetcher.tell_end(flight.pop(key))
        self._cache.commit(key)
        self._late.discard(key)

    def _count_stall(self, key: ExpertKey, began: float, ended: float) -> None:
        seconds = ended - began
        if seconds > _BLOCKED_S:
            self._waited_at = ns(ended)
        self.stats.stall_s += seconds
        self._prefetcher.saw_wait(seconds)
        if self._events.on:
            late = key in self._late
            self._events.emit(TimeSpent(ns(began), ns(ended), Part.WAIT, key.layer, key.expert, late))
        if key in self._late:
            self.stats.late_stall_s += seconds
        else:
            self.stats.demand_stall_s += seconds

    # Using and letting go

    def _look_ahead(self, layer: int, speculate: Callable[[], None] | None) -> None:
        # What was staged for this layer and is not needed makes room for the layers after it.
        self._prefetcher.expire(layer)
        if speculate is not None:
            speculate()

    def _serve_all(
        self,
        keys: Sequence[ExpertKey],
        compute: Compute,
        together: Together | None,
        meanwhile: Callable[[], None],
        pinned: set[ExpertKey],
    ) -> None:
        if together is None or not keys or self._events.on:
            meanwhile()
            for key in keys:
                self._compute(key, compute)
            self._unpin(keys, pinned)
            return
        end = together([key.expert for key in keys], [self._slot(key) for key in keys])
        meanwhile()
        # Before the end, which may begin the next layer's residents: what loses its slot must be none of them. Nobody
        # gets that slot before the next layer asks for one.
        self._unpin(keys, pinned)
        self.stats.compute_s += end()

    def _unpin(self, keys: Sequence[ExpertKey], pinned: set[ExpertKey]) -> None:
        pinned.difference_update(keys)
        self._cache.unpin(keys)

    def _slot(self, key: ExpertKey) -> int:
        slot = self._cache.lookup(key)
        if slot is None:
            raise IntegrityError(f"{key} is to be computed but not resident")
        return slot

    def _serve(self, key: ExpertKey, compute: Compute, pinned: set[ExpertKey]) -> None:
        self._compute(key, compute)
        pinned.discard(key)
        self._cache.unpin([key])

    def _compute(self, key: ExpertKey, compute: Compute) -> None:
        slot = self._slot(key)
        began = perf_counter_ns()
        compute(key.expert, slot)
        ended = perf_counter_ns()
        self.stats.compute_s += (ended - began) * 1e-9
        if self._events.on:
            self._events.emit(TimeSpent(began, ended, Part.EXPERT, key.layer, key.expert))

    def _abandon(self, flight: dict[ExpertKey, Ticket]) -> None:
        """After an error: read no further, and free the slots that nobody writes to any more.

        A chunk that hangs keeps its slot; the engine is not used again after a failed read.
        """
        self._late.clear()
        if not flight:
            return
        for ticket in flight.values():
            self._transfer.cancel(ticket)
        deadline = perf_counter() + SETTLE_S
        while perf_counter() < deadline and not all(ticket.done for ticket in flight.values()):
            sleep(1e-4)
        for key, ticket in flight.items():
            if ticket.done:
                self._cache.abort(key)
                self._prefetcher.tell_end(ticket)
        flight.clear()
