"""``interfaces.Transfer`` on a virtual clock: one link, served one read at a time, demand before speculation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

from foregate.errors import IntegrityError
from foregate.events import ReadSpan
from foregate.interfaces import Ticket
from foregate.sim.device import Device
from foregate.types import ExpertKey


class VirtualClock:
    """Seconds since the simulation began."""

    def __init__(self) -> None:
        self.now = 0.0


@dataclass(slots=True, eq=False)
class SimTicket:
    """A read of which ``left`` seconds of link time remain. It is done once the clock has reached ``done_at``."""

    link: SimTransfer
    key: ExpertKey
    slot: int
    speculative: bool
    left: float
    done_at: float = inf
    cancelled: bool = False
    spans: tuple[ReadSpan, ...] = ()
    """Always empty: no reader thread has read anything."""

    @property
    def done(self) -> bool:
        return self.done_at <= self.link.now

    @property
    def ok(self) -> bool:
        return self.done and not self.cancelled


class SimTransfer:
    """Reads take ``device.read_s`` of the link each; what is being read goes on to the end of its chunk.

    ``stall_s`` is the time that somebody waited for a read. ``busy_s`` is the time that the link was in use.
    """

    def __init__(self, device: Device, clock: VirtualClock) -> None:
        self.stall_s = 0.0
        self.busy_s = 0.0
        self._device = device
        self._clock = clock
        self._at = 0.0  # until when the link is taken; ahead of the clock by less than a chunk
        self._serving: SimTicket | None = None
        self._demand: list[SimTicket] = []
        self._ahead: list[SimTicket] = []

    @property
    def now(self) -> float:
        """The clock's time, with the link served up to it."""
        self._catch_up()
        return self._clock.now

    def submit(self, key: ExpertKey, slot: int, *, speculative: bool) -> SimTicket:
        """Queue the read of ``key``."""
        self._catch_up()
        ticket = SimTicket(self, key, slot, speculative, self._device.read_s)
        (self._ahead if speculative else self._demand).append(ticket)
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """A speculative read that is needed now; one that was cancelled meanwhile goes on where it stopped."""
        self._catch_up()
        mine = _own(ticket)
        if mine.cancelled:
            mine.cancelled = False
            mine.done_at = inf if mine.left > 0 else mine.done_at
        elif mine in self._ahead:
            self._ahead.remove(mine)
        if mine.left > 0:
            self._demand.append(mine)

    def wait(self, ticket: Ticket) -> None:
        """Let the clock run until ``ticket`` has ended. Raises IntegrityError for one that was cancelled."""
        if _own(self.wait_any([ticket])).cancelled:
            raise IntegrityError(f"{ticket.key} waited for after it was cancelled")

    def wait_any(self, tickets: Sequence[Ticket]) -> SimTicket:
        """The first of ``tickets`` that has ended or will end; the clock runs until then."""
        self._catch_up()
        mine = [_own(ticket) for ticket in tickets]
        while all(ticket.done_at == inf for ticket in mine):
            self._serve(inf)
        first = min(mine, key=lambda ticket: ticket.done_at)
        waited = first.done_at - self._clock.now
        if waited > 0:
            self.stall_s += waited
            self._clock.now = first.done_at
        return first

    def cancel(self, ticket: Ticket) -> bool:
        """Read no further chunk; False while one of it is being read."""
        self._catch_up()
        mine = _own(ticket)
        if mine.done:
            return True
        mine.cancelled = True
        for queue in (self._ahead, self._demand):
            if mine in queue:
                queue.remove(mine)
        running = mine is self._serving and self._at > self._clock.now
        mine.done_at = self._at if running else self._clock.now
        return not running

    def rest(self) -> None:
        """Let the clock run until nothing is queued or being read: the pause between two sequences."""
        self._catch_up()
        while self._demand or self._ahead:
            self._serve(inf)
        self._clock.now = max(self._clock.now, self._at)

    def close(self) -> None:
        """Nothing to release."""

    def _catch_up(self) -> None:
        """Serve what the link has done by now."""
        while (self._demand or self._ahead) and self._at < self._clock.now:
            self._serve(self._clock.now)
        if self._at < self._clock.now:
            self._at, self._serving = self._clock.now, None

    def _serve(self, until: float) -> None:
        """The next read, to its end or to the end of the chunk in which ``until`` falls."""
        queue = self._demand or self._ahead
        ticket = queue[0]
        span = ticket.left
        if until - self._at < span:
            chunk = self._device.chunk_s
            span = min(span, ceil((until - self._at) / chunk - 1e-9) * chunk)
        self._at += span
        self.busy_s += span
        ticket.left -= span
        self._serving = ticket
        if ticket.left <= 1e-12:
            ticket.left, ticket.done_at = 0.0, self._at
            queue.pop(0)


def _own(ticket: Ticket) -> SimTicket:
    assert isinstance(ticket, SimTicket), f"a ticket of another transfer: {ticket}"
    return ticket
