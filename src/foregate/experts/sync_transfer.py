"""The transfer without threads: reads on the caller's thread. For tests and for the naive baseline."""

from __future__ import annotations

from collections.abc import Sequence

from foregate.errors import ExpertReadError, TransferError
from foregate.events import ReadSpan, ns
from foregate.experts.attempt import begin, chunk_bytes, finish, read_chunk
from foregate.experts.counters import ReadCounters, TransferStats
from foregate.experts.slots import SlotPool
from foregate.experts.ticket import ExpertTicket, own
from foregate.interfaces import ExpertRead, ExpertStore, Ticket
from foregate.types import ExpertKey


class SyncTransfer:
    """Implements ``interfaces.Transfer``; reads at ``submit``, or with ``lazy`` at ``wait``. Has no time-out.

    Same retries, errors and counters as ``ThreadedTransfer``.
    """

    def __init__(self, store: ExpertStore, pool: SlotPool, *, lazy: bool = False, retries: int = 3) -> None:
        self._store = store
        self._pool = pool
        self._lazy = lazy
        self._retries = retries
        self._counters = ReadCounters()

    def __enter__(self) -> SyncTransfer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submit(self, key: ExpertKey, slot: int, *, speculative: bool) -> ExpertTicket:
        """Begin the read of ``key`` into ``slot``."""
        ticket = ExpertTicket(key, slot, speculative, urgent=not speculative)
        plan = begin(self._store, key, self._pool.view(slot))
        if isinstance(plan, TransferError):
            self._fail(ticket, plan)
        else:
            ticket.read = plan
        if not self._lazy:
            self._load(ticket)
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """Read at ``wait`` what was cancelled, or failed before it was needed."""
        ticket = own(ticket)
        if ticket.cancelled or (ticket.error and ticket.read and not ticket.urgent):
            self._counters.stats.cancelled -= ticket.cancelled
            ticket.cancelled = False
            ticket.rewind()
        ticket.urgent = True

    def wait(self, ticket: Ticket) -> None:
        """Read what is unread. Raises TransferError when the read failed or was cancelled."""
        self.wait_any([ticket]).outcome()

    def wait_any(self, tickets: Sequence[Ticket]) -> ExpertTicket:
        """The first of ``tickets`` (not empty) that has ended, or else the first one, read now."""
        waited = [own(ticket) for ticket in tickets]
        for ticket in waited:
            if not ticket.cancelled:
                self.promote(ticket)
        ended = next((ticket for ticket in waited if ticket.done), waited[0])
        self._load(ended)
        return ended

    def cancel(self, ticket: Ticket) -> bool:
        """Always True: nothing is being read."""
        ticket = own(ticket)
        if not ticket.done:
            ticket.cancelled = ticket.done = True
            ticket.urgent = False
            self._counters.stats.cancelled += 1
        return True

    def stats(self) -> TransferStats:
        """A copy of the counters."""
        return self._counters.snapshot()

    def close(self) -> None:
        """Nothing to release."""

    def _load(self, ticket: ExpertTicket) -> None:
        while not ticket.done:
            assert ticket.read is not None, "a ticket without a plan is done"
            failure = self._read_chunks(ticket, ticket.read) or finish(ticket.read)
            bad_checksum = isinstance(failure, ExpertReadError) and ticket.finished == ticket.read.chunks
            if bad_checksum and ticket.rereads < self._retries:
                ticket.rereads += 1
                self._counters.stats.rereads += 1
                ticket.rewind()
            elif failure:
                self._fail(ticket, failure)
            else:
                ticket.done = True

    def _read_chunks(self, ticket: ExpertTicket, read: ExpertRead) -> TransferError | None:
        for index in range(read.chunks):
            began = self._counters.begin()
            retries, failure = read_chunk(read, index, self._retries)
            nbytes = 0 if failure else chunk_bytes(read, index)
            ended = self._counters.end(began, nbytes, speculative=ticket.speculative)
            ticket.spans.append(ReadSpan(0, ns(began), ns(ended), nbytes))
            self._counters.stats.retries += retries
            if failure:
                return failure
            ticket.finished += 1
        return None

    def _fail(self, ticket: ExpertTicket, error: TransferError) -> None:
        ticket.error = error
        ticket.done = True
        self._counters.fail(needed=ticket.urgent)
