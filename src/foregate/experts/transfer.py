"""Disk to slot in the background: worker threads over one queue of chunks, demand before speculation.

A ticket stays in the queue until its last chunk is taken, and each free worker takes the next chunk of the first
ticket. So the chunks of one expert are read in parallel, and a later demand overtakes what is unread of a speculation.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Sequence
from itertools import count
from time import perf_counter

from foregate.errors import ExpertReadError, TransferError
from foregate.events import ReadSpan, ns
from foregate.experts.attempt import begin, chunk_bytes, finish, read_chunk
from foregate.experts.counters import ReadCounters, TransferStats
from foregate.experts.slots import SlotPool
from foregate.experts.ticket import ExpertTicket, own
from foregate.interfaces import ExpertRead, ExpertStore, Ticket
from foregate.types import ExpertKey

JOIN_S = 5.0
"""Seconds that ``close`` gives the workers; a read that hangs longer is left to its daemon thread."""


class ThreadedTransfer:
    """Implements ``interfaces.Transfer``. One thread submits and waits; ``threads`` workers read and verify.

    OSErrors are retried ``retries`` times a chunk, failed verifications by reading the expert again as often. Failures
    surface only at ``wait``. A ticket that makes no progress for ``timeout_s`` seconds while waited for fails.
    """

    def __init__(
        self, store: ExpertStore, pool: SlotPool, *, threads: int = 4, retries: int = 3, timeout_s: float = 120.0
    ) -> None:
        self._store = store
        self._pool = pool
        self._retries = retries
        self._timeout_s = timeout_s
        self._counters = ReadCounters()
        self._queue: list[tuple[bool, int, ExpertTicket]] = []
        self._order = count()
        self._closed = False
        self._progress_at = 0.0
        lock = threading.Lock()
        self._work = threading.Condition(lock)
        self._ended = threading.Condition(lock)
        self._threads = [
            threading.Thread(target=self._worker, args=(i,), name=f"foregate-read-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> ThreadedTransfer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submit(self, key: ExpertKey, slot: int, *, speculative: bool) -> ExpertTicket:
        """Queue the read of ``key`` into ``slot``. Raises TransferError only when closed."""
        ticket = ExpertTicket(key, slot, speculative, urgent=not speculative)
        plan = begin(self._store, key, self._pool.view(slot))
        with self._work:
            if self._closed:
                raise TransferError(f"expert {key.layer}.{key.expert} submitted to a closed transfer")
            if isinstance(plan, TransferError):
                self._fail(ticket, plan)
                self._settle(ticket)
            else:
                ticket.read = plan
                self._enqueue(ticket)
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """Continue a speculative transfer at demand priority; nothing that was read is read again.

        One that was cancelled is revived, so only its owner may promote it, and only while it holds the slot. One
        that failed before it was needed starts again with new retries.
        """
        ticket = own(ticket)
        with self._work:
            if ticket.urgent or ticket.ok:
                return
            ticket.urgent = True
            self._counters.stats.cancelled -= ticket.cancelled
            ticket.cancelled = False
            if ticket.error is not None and ticket.read is not None:
                ticket.error, ticket.rereads, ticket.restart = None, 0, True
            elif not ticket.over and not ticket.complete:
                ticket.done = False
                self._enqueue(ticket)
            self._settle(ticket)

    def wait(self, ticket: Ticket) -> None:
        """Block until the expert is in its slot, promoting it first. Raises TransferError when it failed, was
        cancelled or made no progress; the slot is not to be reused before ``ticket.done`` (false after a time-out)."""
        self.wait_any([ticket]).outcome()

    def wait_any(self, tickets: Sequence[Ticket]) -> ExpertTicket:
        """Block until one of ``tickets`` (not empty) has ended and return it; its ``wait`` then returns or raises at
        once. Promotes them all but the cancelled."""
        waited = [own(ticket) for ticket in tickets]
        for ticket in waited:
            if not ticket.cancelled:
                self.promote(ticket)
        return self._await(waited)

    def cancel(self, ticket: Ticket) -> bool:
        """Read no further chunk. True: the slot is free now. False: a chunk is being read, poll ``ticket.done``."""
        ticket = own(ticket)
        with self._work:
            if not ticket.done and not ticket.over:
                ticket.cancelled = True
                ticket.urgent = False
                self._counters.stats.cancelled += 1
                self._settle(ticket)
            return ticket.done

    def stats(self) -> TransferStats:
        """A copy of the counters."""
        with self._work:
            return self._counters.snapshot()

    def close(self) -> None:
        """Drop what is queued and join the workers. Waits at most ``JOIN_S`` seconds for running reads."""
        with self._work:
            self._closed = True
            self._work.notify_all()
            self._ended.notify_all()
        deadline = perf_counter() + JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - perf_counter()))

    # Waiting

    def _await(self, tickets: Sequence[ExpertTicket]) -> ExpertTicket:
        began = perf_counter()
        with self._ended:
            while True:
                ended = next((ticket for ticket in tickets if ticket.done or ticket.stalled), None)
                if ended is not None:
                    return ended
                oldest = min(tickets, key=lambda ticket: self._alive_at(ticket, began))
                if self._closed:
                    raise TransferError(f"{self._place(oldest)}: the transfer was closed")
                left = self._alive_at(oldest, began) + self._timeout_s - perf_counter()
                if left <= 0:
                    self._stall(oldest)
                else:
                    self._ended.wait(left)

    def _alive_at(self, ticket: ExpertTicket, began: float) -> float:
        """Time of the last sign of life: its own while a chunk is being read, any while it queues behind others."""
        return max(began, ticket.progress_at if ticket.running else self._progress_at)

    def _stall(self, ticket: ExpertTicket) -> None:
        ticket.stalled = True
        self._fail(ticket, TransferError(f"{self._place(ticket)}: no data for {self._timeout_s:g} s"))

    def _place(self, ticket: ExpertTicket) -> str:
        assert ticket.read is not None, "a ticket without a plan is done"
        return ticket.read.where(min(ticket.finished, ticket.read.chunks - 1))

    # Working

    def _worker(self, reader: int) -> None:
        while (task := self._take()) is not None:
            self._read(reader, *task)

    def _take(self) -> tuple[ExpertTicket, int, float] | None:
        """The next chunk to read and the time of its start; None when closed."""
        with self._work:
            while not self._closed:
                ticket = self._first()
                if ticket is not None:
                    return self._start(ticket)
                self._work.wait()
        return None

    def _first(self) -> ExpertTicket | None:
        """The ticket to serve; entries of tickets that are over or whose last chunk was taken are dropped here."""
        while self._queue:
            ticket = self._queue[0][2]
            assert ticket.read is not None
            if not ticket.over and ticket.next_chunk < ticket.read.chunks:
                return ticket
            heapq.heappop(self._queue)
        return None

    def _start(self, ticket: ExpertTicket) -> tuple[ExpertTicket, int, float]:
        ticket.progress_at = self._counters.begin()
        ticket.running += 1
        ticket.next_chunk += 1
        return ticket, ticket.next_chunk - 1, ticket.progress_at

    def _read(self, reader: int, ticket: ExpertTicket, index: int, began: float) -> None:
        read = ticket.read
        assert read is not None
        retries, failure = read_chunk(read, index, self._retries)
        with self._work:
            nbytes = 0 if failure else chunk_bytes(read, index)
            self._progress_at = ticket.progress_at = self._counters.end(began, nbytes, speculative=ticket.speculative)
            ticket.spans.append(ReadSpan(reader, ns(began), ns(ticket.progress_at), nbytes))
            self._counters.stats.retries += retries
            if failure:
                self._fail(ticket, failure)
            else:
                ticket.finished += 1
            # A cancelled expert with all its chunks is verified all the same, so that it can be revived unread.
            if ticket.error or ticket.finished < read.chunks:
                ticket.running -= 1
                self._settle(ticket)
                return
        self._verify(ticket, read)

    def _verify(self, ticket: ExpertTicket, read: ExpertRead) -> None:
        """Finish the read on this worker, which still counts as running; a bad checksum reads the expert again."""
        failure = finish(read)
        with self._work:
            ticket.running -= 1
            ticket.complete = failure is None
            if isinstance(failure, ExpertReadError) and ticket.rereads < self._retries:
                ticket.rereads += 1
                self._counters.stats.rereads += 1
                ticket.restart = True
            elif failure:
                self._fail(ticket, failure)
            self._settle(ticket)

    # State changes; the lock is held

    def _enqueue(self, ticket: ExpertTicket) -> None:
        assert ticket.read is not None
        heapq.heappush(self._queue, (not ticket.urgent, next(self._order), ticket))
        self._work.notify(ticket.read.chunks - ticket.next_chunk)

    def _fail(self, ticket: ExpertTicket, error: TransferError) -> None:
        """Keep the first error. Recorded for a cancelled ticket too: it may be revived."""
        if ticket.error is None:
            ticket.error = error
            self._counters.fail(needed=ticket.urgent)

    def _settle(self, ticket: ExpertTicket) -> None:
        """Something ended: begin again, or mark the ticket done, unless a chunk of it is still running."""
        if ticket.running:
            return
        if ticket.restart and not ticket.cancelled:
            ticket.rewind()
            self._enqueue(ticket)
        elif ticket.over or ticket.complete:
            ticket.done = True
            self._ended.notify_all()
