"""A store that misbehaves on purpose: read errors, short reads, corrupt bytes, slow reads, hangs. Seeded.

Whether a fault strikes depends only on the seed, the key, the chunk and how often that chunk was read before, never on
threads or time. It never delivers wrong bytes as good ones: see ``Kind.CORRUPT``.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from foregate.errors import ExpertReadError
from foregate.interfaces import ExpertRead, ExpertStore
from foregate.types import ExpertKey, ExpertLayout


class Kind(str, Enum):
    """What goes wrong with the read of one chunk.

    EIO and SHORT raise OSError instead of reading. CORRUPT reads, then flips a bit before the store verifies; if
    the store does not notice, ``finish`` raises ExpertReadError in its place. SLOW sleeps before
    reading. HANG blocks until ``release`` (then reads) or ``close`` (then raises OSError).
    """

    EIO = "eio"
    SHORT = "short"
    CORRUPT = "corrupt"
    SLOW = "slow"
    HANG = "hang"


@dataclass(frozen=True, slots=True)
class Fault:
    """One rule: ``kind`` strikes the first ``first`` reads of a chunk (None: all), each with probability ``rate``.

    ``keys`` and ``chunks`` restrict it (None: all of them). ``seconds`` is the sleep of SLOW.
    """

    kind: Kind
    keys: Collection[ExpertKey] | None = None
    chunks: Collection[int] | None = None
    first: int | None = None
    rate: float = 1.0
    seconds: float = 0.0

    def strikes(self, key: ExpertKey, index: int, attempt: int, seed: str) -> bool:
        """Whether read number ``attempt`` (from 0) of this chunk is hit."""
        if (self.keys is not None and key not in self.keys) or (self.chunks is not None and index not in self.chunks):
            return False
        if self.first is not None and attempt >= self.first:
            return False
        return self.rate >= 1.0 or random.Random(f"{seed}/{key}/{index}/{attempt}").random() < self.rate


class FaultyStore:
    """Wraps ``inner``; the rules of ``plan`` apply in order, up to one that raises. ``injected`` counts the strikes."""

    def __init__(self, inner: ExpertStore, plan: Sequence[Fault], *, seed: int = 0) -> None:
        self.slot_bytes = inner.slot_bytes
        self.injected: Counter[Kind] = Counter()
        self.inner = inner
        self._plan = tuple(plan)
        self._seed = seed
        self._attempts: Counter[tuple[ExpertKey, int]] = Counter()
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._closed = False

    @property
    def direct_io(self) -> bool:
        return self.inner.direct_io

    def layout(self, layer: int) -> ExpertLayout:
        return self.inner.layout(layer)

    def begin(self, key: ExpertKey, into: memoryview) -> FaultyRead:
        """Plan a read; the faults strike when chunks are read."""
        return FaultyRead(self, self.inner.begin(key, into), key, into)

    def strike(self, key: ExpertKey, index: int) -> list[Fault]:
        """The faults of the next read of this chunk, counted."""
        with self._lock:
            attempt = self._attempts[key, index]
            self._attempts[key, index] += 1
            faults = []
            for rule, fault in enumerate(self._plan):
                if fault.strikes(key, index, attempt, f"{self._seed}/{rule}"):
                    faults.append(fault)
                    self.injected[fault.kind] += 1
                if faults and faults[-1].kind in (Kind.EIO, Kind.SHORT):
                    break
        return faults

    def hang(self) -> None:
        """Block until released. Raises OSError if that was by ``close``."""
        self._released.wait()
        if self._closed:
            raise OSError(errno.ECANCELED, "store closed during a hanging read")

    def release(self) -> None:
        """End every hang, now and later: the reads go on."""
        self._released.set()

    def close(self) -> None:
        """End every hang with an error and close the inner store."""
        self._closed = True
        self._released.set()
        self.inner.close()


class FaultyRead:
    """One read through a FaultyStore. ``corrupt``: the chunks read last whose bytes are to be wrong."""

    def __init__(self, store: FaultyStore, inner: ExpertRead, key: ExpertKey, into: memoryview) -> None:
        self.chunks = inner.chunks
        self.disk_bytes = inner.disk_bytes
        self._store = store
        self._inner = inner
        self._key = key
        self._into = into
        self.corrupt: set[int] = set()

    def read(self, index: int) -> None:
        """Read chunk ``index`` after what the plan does to it. Raises OSError for EIO, SHORT and a closed HANG."""
        self.corrupt.discard(index)
        for fault in self._store.strike(self._key, index):
            self._apply(fault, index)
        self._inner.read(index)

    def finish(self) -> None:
        """Verify. Raises ExpertReadError if a chunk was corrupted, from the inner store if it notices."""
        if not self.corrupt:
            self._inner.finish()
            return
        self._into[0] ^= 1
        self._inner.finish()
        # The store did not notice: it has no checksum, or assembled the slot from a buffer of its own.
        raise ExpertReadError(f"{self.where(min(self.corrupt))}: corrupt bytes (injected)")

    def where(self, index: int) -> str:
        return self._inner.where(index)

    def _apply(self, fault: Fault, index: int) -> None:
        if fault.kind is Kind.EIO:
            raise OSError(errno.EIO, "Input/output error (injected)")
        if fault.kind is Kind.SHORT:
            raise OSError(errno.EIO, "short read (injected)")
        if fault.kind is Kind.SLOW:
            time.sleep(fault.seconds)
        elif fault.kind is Kind.HANG:
            self._store.hang()
        else:
            self.corrupt.add(index)
