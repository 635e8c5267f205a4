"""An expert store without a disk: deterministic bytes for every key. For tests of caches, transfers and engines."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from functools import lru_cache

from foregate.errors import ExpertReadError
from foregate.types import ExpertKey, ExpertLayout, ParamLayout


class MemoryStore:
    """Serves any key: ``slot_bytes`` pseudo-random bytes that depend on ``seed`` and the key, in ``chunks`` parts.

    Every read of a chunk sleeps ``latency_s`` seconds and is counted in ``reads[key, chunk]``. With ``verify`` (the
    default) ``finish`` compares all bytes and raises ExpertReadError, as a store with checksums does.
    """

    direct_io = False

    def __init__(
        self, slot_bytes: int = 4096, *, chunks: int = 1, latency_s: float = 0.0, seed: int = 0, verify: bool = True
    ) -> None:
        self.slot_bytes = slot_bytes
        self.chunks = chunks
        self.latency_s = latency_s
        self.verify = verify
        self.reads: Counter[tuple[ExpertKey, int]] = Counter()
        self.closed = False
        self._lock = threading.Lock()
        self.expert_bytes = lru_cache(maxsize=256)(lambda key: random.Random(f"{seed}/{key}").randbytes(slot_bytes))

    def layout(self, layer: int) -> ExpertLayout:
        """One parameter of bytes that fills the slot."""
        return ExpertLayout((ParamLayout("bytes", "U8", (self.slot_bytes,), 0, self.slot_bytes),), self.slot_bytes)

    def begin(self, key: ExpertKey, into: memoryview) -> MemoryRead:
        """Plan a read. Raises ValueError if ``into`` is not ``slot_bytes`` long."""
        if len(into) != self.slot_bytes:
            raise ValueError(f"buffer of {len(into)} bytes for an expert of {self.slot_bytes}")
        return MemoryRead(self, key, into)

    def count(self, key: ExpertKey, index: int) -> None:
        """Count one read of chunk ``index``; thread-safe."""
        with self._lock:
            self.reads[key, index] += 1

    def close(self) -> None:
        self.closed = True


class MemoryRead:
    """One read of a MemoryStore."""

    def __init__(self, store: MemoryStore, key: ExpertKey, into: memoryview) -> None:
        self.chunks = store.chunks
        self.disk_bytes = store.slot_bytes
        self._store = store
        self._key = key
        self._into = into

    def read(self, index: int) -> None:
        """Copy chunk ``index``."""
        self._store.count(self._key, index)
        if self._store.latency_s:
            time.sleep(self._store.latency_s)
        start, end = self._offset(index), self._offset(index + 1)
        self._into[start:end] = self._store.expert_bytes(self._key)[start:end]

    def finish(self) -> None:
        """Verify. Raises ExpertReadError if a byte differs."""
        if self._store.verify and self._into != self._store.expert_bytes(self._key):
            raise ExpertReadError(f"{self.where(0)}: bytes do not match")

    def where(self, index: int) -> str:
        return f"memory, offset {self._offset(index)}, expert {self._key.layer}.{self._key.expert}"

    def _offset(self, index: int) -> int:
        return self.disk_bytes * index // self.chunks
