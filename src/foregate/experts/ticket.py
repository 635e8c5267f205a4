"""The state of one transfer, from submit to its end. Nothing here locks: the transfer does."""

from __future__ import annotations

from dataclasses import dataclass, field

from foregate.errors import TransferError
from foregate.events import ReadSpan
from foregate.interfaces import ExpertRead, Ticket
from foregate.types import ExpertKey


@dataclass(slots=True, eq=False)
class ExpertTicket:
    """Owners read ``key``, ``slot``, ``speculative``, ``done``, ``ok``, ``error``, ``spans``; the rest is not theirs.

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
    spans: list[ReadSpan] = field(default_factory=list)

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

    def outcome(self) -> None:
        """Raises TransferError if the transfer failed or was cancelled; for tickets that have ended."""
        if self.error is not None:
            raise self.error
        if self.cancelled:
            raise TransferError(f"expert {self.key.layer}.{self.key.expert} waited for after it was cancelled")


def own(ticket: Ticket) -> ExpertTicket:
    """``ticket`` as the transfers of this package made it."""
    assert isinstance(ticket, ExpertTicket), f"a ticket of another transfer: {ticket}"
    return ticket
