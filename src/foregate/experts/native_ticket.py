"""The state of one native transfer: a number that the reading threads write and Python looks at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from foregate.errors import ExpertReadError, TransferError
from foregate.events import ReadSpan
from foregate.interfaces import Ticket
from foregate.native.reads import Failure, ReadError, Status
from foregate.types import ExpertKey


class Owner(Protocol):
    """What a ticket asks of its transfer."""

    def observe(self, ticket: NativeTicket) -> int:
        """Note the state of ``ticket`` in it."""
        ...

    def spans(self, ticket: NativeTicket) -> tuple[ReadSpan, ...]:
        """What has been read for ``ticket``; nothing once its slot has another."""
        ...


class NativeTicket:
    """Implements ``interfaces.Ticket``. The number belongs to the slot, so a ticket keeps its end when it sees it:
    the slot's next ticket may overwrite it. Looking costs no call as long as the read runs."""

    __slots__ = ("_owner", "_spans", "_states", "cancelled", "end", "error", "key", "slot", "speculative", "urgent")

    def __init__(self, key: ExpertKey, slot: int, *, speculative: bool, states: memoryview[int], owner: Owner) -> None:
        self.key = key
        self.slot = slot
        self.speculative = speculative
        self.urgent = not speculative
        self.cancelled = False
        self.end: int = Status.RUNNING
        self.error: TransferError | None = None
        self._states = states
        self._owner = owner
        self._spans: tuple[ReadSpan, ...] = ()

    @property
    def done(self) -> bool:
        """True once nothing writes to the slot any more: complete, failed or cancelled."""
        return self.end >= Status.COMPLETE or (
            self._states[self.slot] >= Status.COMPLETE and self._owner.observe(self) >= Status.COMPLETE
        )

    @property
    def ok(self) -> bool:
        """True once the verified bytes are in the slot."""
        return self.done and self.end == Status.COMPLETE

    @property
    def spans(self) -> Sequence[ReadSpan]:
        """What has been read for it so far. To be asked before the slot is used again."""
        self._spans = self._owner.spans(self) or self._spans
        return self._spans

    @property
    def ended(self) -> bool:
        """``done``, or timed out with a read that still hangs."""
        return self.end != Status.RUNNING or (
            self._states[self.slot] != Status.RUNNING and self._owner.observe(self) != Status.RUNNING
        )

    def outcome(self) -> None:
        """Raises TransferError if the transfer failed or was cancelled; for tickets that have ended."""
        if self.error is not None:
            raise self.error
        if self.end == Status.CANCELLED:
            raise TransferError(f"expert {self.key.layer}.{self.key.expert} waited for after it was cancelled")


def explained(found: ReadError, place: str, timeout_s: float) -> TransferError:
    """The error to raise at the wait; ``place`` names file, offset and expert."""
    if found.failure == Failure.TIMEOUT:
        return TransferError(f"{place}: no data for {timeout_s:g} s")
    if found.failure == Failure.CHECKSUM:
        return ExpertReadError(f"{place}: checksum mismatch")
    if found.failure == Failure.TRUNCATED:
        return ExpertReadError(f"{place}: truncated: the file has {found.size} bytes")
    error = ExpertReadError(f"{place}: [Errno {found.number}] {os.strerror(found.number)}")
    error.__cause__ = OSError(found.number, os.strerror(found.number))
    return error


def own(ticket: Ticket) -> NativeTicket:
    """``ticket`` as the native transfer made it."""
    assert isinstance(ticket, NativeTicket), f"a ticket of another transfer: {ticket}"
    return ticket
