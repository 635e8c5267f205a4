"""Two transfers over one pool: exact experts, and a smaller pack of the same experts for reads that may be coarse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

from foregate.experts.counters import TransferStats
from foregate.experts.readers import AnyTransfer
from foregate.interfaces import Ticket
from foregate.types import ExpertKey


class PairedTransfer:
    """Implements ``interfaces.Transfer`` with the exact one, and adds ``submit_low``.

    Each has reader threads of its own: a coarse demand read runs beside exact speculative chunks and overtakes none.
    """

    def __init__(self, exact: AnyTransfer, low: AnyTransfer, on_close: Callable[[], None] = lambda: None) -> None:
        self._exact = exact
        self._low = low
        self._on_close = on_close
        self._coarse: dict[int, Ticket] = {}

    def submit(self, key: ExpertKey, slot: int, *, speculative: bool) -> Ticket:
        """Read ``key`` exactly."""
        self._coarse.pop(slot, None)
        return self._exact.submit(key, slot, speculative=speculative)

    def submit_low(self, key: ExpertKey, slot: int) -> Ticket:
        """Read ``key`` in low precision, now."""
        ticket = self._coarse[slot] = self._low.submit(key, slot, speculative=False)
        return ticket

    def promote(self, ticket: Ticket) -> None:
        self._of(ticket).promote(ticket)

    def wait(self, ticket: Ticket) -> None:
        """Raises TransferError when it failed."""
        self._of(ticket).wait(ticket)

    def wait_any(self, tickets: Sequence[Ticket]) -> Ticket:
        """One that has ended; if none has, the first of the coarse ones to arrive: they are the smaller reads."""
        coarse = [ticket for ticket in tickets if self._of(ticket) is self._low]
        if len(coarse) in (0, len(tickets)):
            return (self._low if coarse else self._exact).wait_any(tickets)
        for ticket in tickets:
            self.promote(ticket)
        ended = next((ticket for ticket in tickets if ticket.done), None)
        return ended or self._low.wait_any(coarse)

    def cancel(self, ticket: Ticket) -> bool:
        return self._of(ticket).cancel(ticket)

    def stats(self) -> TransferStats:
        """Sums; ``active_s`` counts time twice in which both read."""
        one, two = self._exact.stats(), self._low.stats()
        return TransferStats(**{f.name: getattr(one, f.name) + getattr(two, f.name) for f in fields(TransferStats)})

    def close(self) -> None:
        self._exact.close()
        self._low.close()
        self._on_close()

    def _of(self, ticket: Ticket) -> AnyTransfer:
        return self._low if self._coarse.get(ticket.slot) is ticket else self._exact
