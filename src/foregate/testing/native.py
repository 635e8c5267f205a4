"""The native transfer over any store: its threads call Python instead of reading a file. For tests."""

from __future__ import annotations

import ctypes
import errno
from dataclasses import dataclass, field

import xxhash

from foregate.experts.native_transfer import NativeTransfer, Place
from foregate.experts.slots import SlotPool
from foregate.testing.faults import FaultyRead, FaultyStore
from foregate.testing.stores import MemoryStore
from foregate.types import ExpertKey

STRIDE = 1 << 32
"""Bytes between two experts in the file that does not exist."""


@dataclass(eq=False)
class StoreAsFile:
    """``store`` (a MemoryStore, or faults around one) as the file that a native transfer reads."""

    store: MemoryStore | FaultyStore
    path: str = "memory"
    direct_io: bool = False
    keys: list[ExpertKey] = field(default_factory=list)

    def __post_init__(self) -> None:
        inner = self.store.inner if isinstance(self.store, FaultyStore) else self.store
        assert isinstance(inner, MemoryStore)
        self.good = inner
        self.slot_bytes = inner.slot_bytes
        self.chunk_bytes = -(-inner.slot_bytes // inner.chunks // 1024) * 1024

    def place(self, key: ExpertKey) -> Place:
        """A place of its own for every key."""
        self.keys.append(key)
        checksum = xxhash.xxh3_128(self.good.expert_bytes(key)).hexdigest() if self.good.verify else None
        return Place((len(self.keys) - 1) * STRIDE, self.slot_bytes, checksum)

    def where(self, key: ExpertKey, at: int) -> str:
        return f"memory, offset {at}, expert {key.layer}.{key.expert}"

    def refuse_direct(self) -> None:
        raise AssertionError("nothing was read directly")

    def read(self, offset: int, address: int, nbytes: int) -> int:
        """One chunk, as ``pread`` would; an OSError of the store becomes a negated errno."""
        number, at = divmod(offset, STRIDE)
        slot = memoryview((ctypes.c_char * self.slot_bytes).from_address(address - at)).cast("B")
        index = at // self.chunk_bytes
        read = self.store.begin(self.keys[number], slot)
        try:
            read.read(index)
        except OSError as error:
            return -(error.errno or errno.EIO)
        if isinstance(read, FaultyRead) and index in read.corrupt:
            slot[at] ^= 1
        return nbytes


def native_over(store: MemoryStore | FaultyStore, pool: SlotPool, **settings: float) -> NativeTransfer:
    """A native transfer whose chunks are the chunks of ``store``, which must be equal and of whole KiB."""
    file = StoreAsFile(store)
    return NativeTransfer(file, pool, chunk_bytes=file.chunk_bytes, source=file.read, **settings)  # type: ignore[arg-type]
