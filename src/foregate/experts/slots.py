"""The budgeted pool: one anonymous mapping cut into equal slots, and the free list. Knows no experts."""

from __future__ import annotations

import mmap
from contextlib import suppress

from foregate.errors import BudgetError, IntegrityError
from foregate.types import ALIGNMENT

HUGE_PAGE = 2 << 20
"""Bytes of a transparent huge page on x86-64 and on arm64 with 4 KiB pages."""


class SlotPool:
    """``slots`` page-aligned buffers of ``slot_bytes`` bytes each. Not thread-safe: one thread takes and gives.

    A slot's memory is committed when it is first written, so an unused pool costs nothing. Slots given back last are
    taken first, which keeps the committed part small. With huge pages the first write to a slot may commit up to one
    huge page of a neighbour, never anything beyond the pool. Raises BudgetError for an empty or misaligned pool.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        if slots < 1:
            raise BudgetError(f"the expert pool needs at least 1 slot, not {slots}")
        if slot_bytes < 1 or slot_bytes % ALIGNMENT:
            raise BudgetError(f"slot size must be a positive multiple of {ALIGNMENT} bytes, not {slot_bytes}")
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.capacity_bytes = slots * slot_bytes
        self.peak_slots = 0
        # MAP_PRIVATE: Python's default (shared) would be charged as shmem and get no huge pages.
        self._memory = mmap.mmap(-1, self.capacity_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._advise()
        self._view = memoryview(self._memory)
        self._free = list(range(slots - 1, -1, -1))
        self._taken = bytearray(slots)

    @property
    def free(self) -> int:
        """Slots that ``take`` can still hand out."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Slots in use now."""
        return self.slots - len(self._free)

    @property
    def peak_bytes(self) -> int:
        """Most bytes ever in use at the same time."""
        return self.peak_slots * self.slot_bytes

    def view(self, slot: int) -> memoryview:
        """Writable bytes of ``slot``, taken or not. Raises IndexError outside the pool."""
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} is outside the pool of {self.slots}")
        start = slot * self.slot_bytes
        return self._view[start : start + self.slot_bytes]

    def whole(self) -> memoryview:
        """Writable bytes of all slots, one behind another."""
        return self._view

    def take(self) -> int | None:
        """A free slot, contents undefined; None when every slot is in use."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._taken[slot] = 1
        self.peak_slots = max(self.peak_slots, self.used)
        return slot

    def give(self, slot: int) -> None:
        """Return ``slot``. Raises IntegrityError if it is not in use."""
        if not 0 <= slot < self.slots or not self._taken[slot]:
            raise IntegrityError(f"slot {slot} given back but not in use")
        self._taken[slot] = 0
        self._free.append(slot)

    def commit(self) -> None:
        """Have the system give all memory now, and not while experts are read into it. Raises IntegrityError unless
        every slot is free: a byte of each page is overwritten."""
        if self.used:
            raise IntegrityError(f"a pool with {self.used} slots in use is not overwritten")
        self._view[:: mmap.PAGESIZE] = bytes(len(range(0, self.capacity_bytes, mmap.PAGESIZE)))

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every slot is either free once or taken."""
        if len(set(self._free)) != len(self._free):
            raise IntegrityError(f"a slot is free twice: {sorted(self._free)}")
        if any(self._taken[slot] for slot in self._free) or sum(self._taken) != self.used:
            raise IntegrityError(f"{sum(self._taken)} slots marked in use, {self.used} missing from the free list")

    def _advise(self) -> None:
        """Huge pages for slots much larger than one; no copy of the pool in a forked child."""
        with suppress(OSError, AttributeError):
            if self.slot_bytes >= 2 * HUGE_PAGE:
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        with suppress(OSError, AttributeError):
            # open(2): a fork during an O_DIRECT read into a private mapping can lose the data that was read.
            self._memory.madvise(mmap.MADV_DONTFORK)
