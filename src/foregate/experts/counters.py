"""What a transfer has moved and how long it took. Nothing here locks: the transfer does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter


@dataclass(slots=True)
class TransferStats:
    """Counters since the transfer was opened; bytes as read from the store, what was read again included.

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


class ReadCounters:
    """Keeps ``stats`` up to date as chunk reads begin and end, several at the same time."""

    def __init__(self) -> None:
        self.stats = TransferStats()
        self._running = 0
        self._since = 0.0

    def begin(self) -> float:
        """A chunk read begins: the time."""
        now = perf_counter()
        if self._running == 0:
            self._since = now
        self._running += 1
        return now

    def end(self, began: float, nbytes: int, *, speculative: bool) -> float:
        """The read that began at ``began`` ends with ``nbytes`` bytes (0: it failed): the time."""
        now = perf_counter()
        stats = self.stats
        stats.chunks += nbytes > 0
        stats.prefetch_bytes += nbytes * speculative
        stats.demand_bytes += nbytes * (not speculative)
        stats.busy_s += now - began
        self._running -= 1
        if self._running == 0:
            stats.active_s += now - self._since
        return now

    def fail(self, *, needed: bool) -> None:
        """A transfer failed for good, ``needed`` or still a speculation."""
        self.stats.failed += 1
        self.stats.failed_prefetch += not needed

    def snapshot(self) -> TransferStats:
        """A copy, up to this moment."""
        running = perf_counter() - self._since if self._running else 0.0
        return replace(self.stats, active_s=self.stats.active_s + running)
