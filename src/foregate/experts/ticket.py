"""One transfer from submit to its end, and the counters of a transfer. Nothing here locks: the transfer does."""

from __future__ import annotations

from dataclasses import dataclass

from foregate.errors import TransferError
from foregate.interfaces import ExpertRead
from foregate.types import ExpertKey


@dataclass(slots=True)
class TransferStats:
    """Counters since the transfer was opened; bytes as read from the store. Thread-safe copies: ``stats()``.

    A promoted read stays in ``prefetch_bytes``: it was issued speculatively. ``busy_s`` sums the seconds of all
    threads in reads; ``active_s`` is the wall time with at least one read running, so that
    ``(demand_bytes + prefetch_bytes) / active_s`` is the bandwidth reached. ``failed`` includes ``failed_prefetch``,
    the speculative transfers that failed before anybody needed them.
    """

    demand_bytes: int = 0
    prefetch_bytes: int = 0
    chunks: int = 0
    retries: int = 0
    rereads: int = 0
    failed: int = 0
    failed_prefetch: int = 0
    cancelled: int = 0
    busy_s: float = 0.0
    active_s: float = 0.0


@dataclass(slots=True, eq=False)
class ExpertTicket:
    """Owners read ``key``, ``slot``, ``speculative``, ``done``, ``ok`` and ``error``; the rest belongs to the transfer.

    ``done``: nothing writes to the slot any more (complete, failed or cancelled). ``speculative`` is how the ticket
    was issued and stays as it is; ``urgent`` is its priority now.
    """

    key: ExpertKey
    slot: int
    speculative: bool
    done: bool = False
    error: TransferError | None = None
    cancelled: bool = False
    stalled: bool = False
    urgent: bool = False
    restart: bool = False
    complete: bool = False
    read: ExpertRead | None = None
    next_chunk: int = 0
    running: int = 0
    finished: int = 0
    rereads: int = 0
    progress_at: float = 0.0

    @property
    def ok(self) -> bool:
        """True once the verified bytes are in the slot."""
        return self.done and self.error is None and not self.cancelled

    @property
    def over(self) -> bool:
        """True when no further chunk is to be read: failed or cancelled, though a chunk may still be running."""
        return self.cancelled or self.error is not None

    def rewind(self) -> None:
        """Begin again with the first chunk. Only while nothing is running."""
        self.next_chunk = self.finished = 0
        self.done = self.restart = self.complete = False
        self.error = None
