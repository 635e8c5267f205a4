"""Disk to slot without Python on the way: a whole expert is submitted, C threads split, read and verify it.

Only for experts that lie in one file exactly as they lie in memory: packs. ``ThreadedTransfer`` does everything else.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, Protocol

from foregate.checkpoint.readplan import CHUNK_BYTES
from foregate.errors import ConfigError, ForegateError, TransferError
from foregate.events import ReadSpan, ns
from foregate.experts.counters import TransferStats
from foregate.experts.native_ticket import NativeTicket, explained, own
from foregate.experts.slots import SlotPool
from foregate.interfaces import Ticket
from foregate.native.library import function
from foregate.native.reads import CALLED, COUNTS, SOURCE, TIMES, ReadCounts, ReadError, Source, Span, Status, library
from foregate.types import ALIGNMENT, ExpertKey

SLICE_S = 0.1
"""Seconds after which a wait comes back to Python, so that an interrupt is heard."""

JOIN_S = 5.0
"""Seconds that ``close`` gives the threads; one in a read that hangs longer is left alone."""

_LEFT_BEHIND: list[object] = []
"""Memory that a hanging read may still write to: kept for ever."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an expert lies: bytes of a file, and their xxh3_128 as hexadecimal digits (None: not to be verified)."""

    offset: int
    nbytes: int
    checksum: str | None


class _Known(NamedTuple):
    """What the reader is told of an expert."""

    offset: int
    nbytes: int
    digest_at: int | None
    digest: object


class ExpertFile(Protocol):
    """A store whose experts are aligned ranges of one file, in slot layout."""

    slot_bytes: int
    path: str

    @property
    def direct_io(self) -> bool: ...

    def place(self, key: ExpertKey) -> Place:
        """Where ``key`` lies. Raises LookupError for a key that the model does not have."""
        ...

    def where(self, key: ExpertKey, at: int) -> str:
        """File, offset and expert of the byte ``at`` of ``key``, for error messages."""
        ...

    def refuse_direct(self) -> None:
        """Told that the file system does not read past the page cache after all."""
        ...


def available() -> bool:
    """Whether the compiled part was built and loads."""
    return library() is not None


class NativeTransfer:
    """Implements ``interfaces.Transfer`` as ``ThreadedTransfer`` does: same order, retries, errors and counters.

    ``source`` replaces reading the file (tests). Raises ConfigError where the library is missing or no thread starts.
    """

    def __init__(
        self,
        store: ExpertFile,
        pool: SlotPool,
        *,
        threads: int = 4,
        retries: int = 3,
        timeout_s: float = 120.0,
        chunk_bytes: int = CHUNK_BYTES,
        source: Source | None = None,
    ) -> None:
        found = library()
        if found is None:
            raise ConfigError("the compiled reader is missing or switched off (FOREGATE_NATIVE)")
        if chunk_bytes <= 0 or chunk_bytes % 1024 or (chunk_bytes % ALIGNMENT and source is None):
            raise ConfigError(f"chunk size {chunk_bytes} is not a positive multiple of {ALIGNMENT} bytes")
        self._lib = found
        self._store = store
        self._chunk_bytes = chunk_bytes
        self._timeout_s = timeout_s
        self._closed = False
        numbers = (ctypes.c_int32 * pool.slots)()
        self._states = memoryview(numbers).cast("B").cast("i")
        self._tickets: list[NativeTicket | None] = [None] * pool.slots
        self._known: dict[ExpertKey, _Known] = {}
        first = ctypes.c_char.from_buffer(pool.view(0))
        self._memory, self._slot_bytes = ctypes.addressof(first), pool.slot_bytes
        callback = SOURCE(source) if source else SOURCE()
        files = _open(store) if source is None else (-1, -1)
        self._pool = found.reads_open(threads, pool.slots, numbers, retries, *files, callback)
        self._finalizer = weakref.finalize(self, _release, found, self._pool, files, (numbers, pool, first, callback))
        self._submit, self._promote, self._cancel, self._status = (function(found, *call) for call in CALLED.items())
        if not self._pool or not found.reads_threads(self._pool):
            self._finalizer()
            raise ConfigError(f"no reader thread could be started (of {threads})")

    def __enter__(self) -> NativeTransfer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submit(self, key: ExpertKey, slot: int, *, speculative: bool) -> NativeTicket:
        """Queue the read of ``key`` into ``slot``, whose last ticket must be done. Raises TransferError when closed."""
        if self._closed:
            raise TransferError(f"expert {key.layer}.{key.expert} submitted to a closed transfer")
        last = self._tickets[slot]
        assert last is None or last.done, f"slot {slot} is still being written: {last}"
        offset, nbytes, digest_at, _ = self._known.get(key) or self._find(key)
        ticket = NativeTicket(key, slot, speculative=speculative, states=self._states, owner=self)
        memory = self._memory + slot * self._slot_bytes
        if not self._submit(self._pool, slot, offset, nbytes, self._chunk_bytes, memory, speculative, digest_at):
            raise MemoryError(f"no memory to read expert {key.layer}.{key.expert}")
        self._tickets[slot] = ticket
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """Continue a speculative transfer at demand priority; nothing that was read is read again.

        One that was cancelled is revived, so only its owner may promote it, and only while it holds the slot. One
        that failed before it was needed starts again with new retries.
        """
        ticket = own(ticket)
        if ticket.urgent or ticket.ok:
            return
        ticket.urgent, ticket.cancelled = True, False
        ticket.end, ticket.error = Status.RUNNING, None
        self._promote(self._pool, ticket.slot)

    def wait(self, ticket: Ticket) -> None:
        """Block until the expert is in its slot, promoting it first. Raises TransferError when it failed, was
        cancelled or made no progress; the slot is not to be reused before ``ticket.done`` (false after a time-out)."""
        self.wait_any([ticket]).outcome()

    def wait_any(self, tickets: Sequence[Ticket]) -> NativeTicket:
        """Block until one of ``tickets`` (not empty) has ended and return it; its ``wait`` then returns or raises at
        once. Promotes them all but the cancelled."""
        waited = [own(ticket) for ticket in tickets]
        for ticket in waited:
            if not ticket.urgent and not ticket.cancelled:
                self.promote(ticket)
        ended = next((ticket for ticket in waited if ticket.ended), None)
        return ended or self._await(waited)

    def cancel(self, ticket: Ticket) -> bool:
        """Read no further chunk. True: the slot is free now. False: a chunk is being read, poll ``ticket.done``."""
        ticket = own(ticket)
        if not ticket.done:
            ticket.urgent, ticket.cancelled = False, True
            self._cancel(self._pool, ticket.slot)
        return ticket.done

    def stats(self) -> TransferStats:
        """A copy of the counters."""
        counts = ReadCounts()
        if self._lib.reads_stats(self._pool, counts) and self._store.direct_io:
            self._store.refuse_direct()
        return TransferStats(**{name: getattr(counts, name) for name in (*COUNTS, *TIMES)})

    def close(self) -> None:
        """Drop what is queued and end the threads. Waits at most ``JOIN_S`` seconds for running reads."""
        self._closed = True
        self._lib.reads_close(self._pool, JOIN_S)

    def observe(self, ticket: NativeTicket) -> int:
        """Note how far ``ticket`` has come, for good if it has ended, and see what was written to its slot."""
        ticket.end = self._status(self._pool, ticket.slot)
        if ticket.end in (Status.FAILED, Status.STALLED) and ticket.error is None:
            found = ReadError()
            self._lib.reads_error(self._pool, ticket.slot, found)
            place = self._store.where(ticket.key, found.offset - self._known[ticket.key].offset)
            ticket.error = explained(found, place, self._timeout_s)
        return ticket.end

    def spans(self, ticket: NativeTicket) -> tuple[ReadSpan, ...]:
        """What has been read for ``ticket``; nothing once its slot has another."""
        if self._tickets[ticket.slot] is not ticket:
            return ()
        room = self._lib.reads_spans(self._pool, ticket.slot, None, 0)
        found = (Span * room)()
        count = min(room, self._lib.reads_spans(self._pool, ticket.slot, found, room))
        return tuple(ReadSpan(s.reader, ns(s.began), ns(s.ended), s.nbytes) for s in found[:count])

    def _find(self, key: ExpertKey) -> _Known:
        try:
            place = self._store.place(key)
        except (LookupError, ForegateError) as error:
            raise TransferError(f"expert {key.layer}.{key.expert}: {error}") from error
        assert place.nbytes <= self._slot_bytes, f"{key} has {place.nbytes} bytes"
        digest = None
        if place.checksum is not None:
            value = int(place.checksum, 16)
            digest = (ctypes.c_uint64 * 2)(value & (2**64 - 1), value >> 64)
        at = None if digest is None else ctypes.addressof(digest)
        known = self._known[key] = _Known(place.offset, place.nbytes, at, digest)
        return known

    def _await(self, tickets: Sequence[NativeTicket]) -> NativeTicket:
        slots = (ctypes.c_int32 * len(tickets))(*(ticket.slot for ticket in tickets))
        began, index = perf_counter(), -1
        while index == -1:
            index = self._lib.reads_wait(self._pool, slots, len(tickets), began, self._timeout_s, SLICE_S)
        if index < 0:
            raise TransferError(f"{self._store.where(tickets[0].key, 0)}: the transfer was closed")
        self.observe(tickets[index])
        return tickets[index]


def _open(store: ExpertFile) -> tuple[int, int]:
    """The file twice: past the page cache (or -1), and through it."""
    plain = os.open(store.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        direct = os.open(store.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT) if store.direct_io else -1
    except BaseException:
        os.close(plain)
        raise
    return direct, plain


def _release(lib: ctypes.CDLL, pool: int | None, files: tuple[int, int], memory: tuple[object, ...]) -> None:
    """End the threads and let everything go, unless a read hangs: it may still write where it was told to."""
    if pool and lib.reads_close(pool, JOIN_S):
        _LEFT_BEHIND.append(memory)
        return
    if pool:
        lib.reads_free(pool)
    for fd in files:
        if fd >= 0:
            os.close(fd)
