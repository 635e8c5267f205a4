"""The pool: bounds, alignment, free list, and that memory is committed only when written."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import pytest

from foregate.errors import BudgetError, IntegrityError
from foregate.experts.slots import HUGE_PAGE, SlotPool


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_views_are_aligned_writable_and_disjoint() -> None:
    pool = SlotPool(5, 8192)
    for slot in range(5):
        view = pool.view(slot)
        assert len(view) == 8192
        assert address(view) % 4096 == 0
        view[:] = bytes([slot]) * 8192
    assert all(bytes(pool.view(slot)) == bytes([slot]) * 8192 for slot in range(5))
    assert pool.capacity_bytes == 5 * 8192


@pytest.mark.parametrize(("slots", "slot_bytes"), [(0, 4096), (-1, 4096), (1, 0), (1, 4097), (1, -4096)])
def test_an_impossible_pool_is_refused_with_the_value(slots: int, slot_bytes: int) -> None:
    with pytest.raises(BudgetError, match=str(slots if slots < 1 else slot_bytes)):
        SlotPool(slots, slot_bytes)


@pytest.mark.parametrize("slot", [-1, 2])
def test_a_view_outside_the_pool_is_refused(slot: int) -> None:
    with pytest.raises(IndexError, match=str(slot)):
        SlotPool(2, 4096).view(slot)


def test_take_give_and_peak() -> None:
    pool = SlotPool(3, 4096)
    assert [pool.take() for _ in range(4)] == [0, 1, 2, None]
    assert (pool.free, pool.used, pool.peak_slots, pool.peak_bytes) == (0, 3, 3, 3 * 4096)
    pool.give(1)
    pool.give(0)
    assert (pool.free, pool.used, pool.peak_slots) == (2, 1, 3)
    pool.check_integrity()
    assert pool.take() == 0, "the slot given back last is taken first, so that few slots are ever committed"


@pytest.mark.parametrize("slot", [0, 1, -1, 2])
def test_giving_back_what_is_not_in_use_is_an_error(slot: int) -> None:
    pool = SlotPool(2, 4096)
    pool.take()
    pool.give(0)
    with pytest.raises(IntegrityError, match=str(slot)):
        pool.give(slot)
    pool.check_integrity()


def test_integrity_check_sees_a_damaged_free_list() -> None:
    pool = SlotPool(2, 4096)
    pool._free.append(0)
    with pytest.raises(IntegrityError, match="free twice"):
        pool.check_integrity()
    pool = SlotPool(2, 4096)
    pool._free.pop()
    with pytest.raises(IntegrityError, match="marked in use"):
        pool.check_integrity()


def test_untouched_slots_are_never_committed() -> None:
    before = resident_bytes()
    pool = SlotPool(64, 8 * HUGE_PAGE)
    slot = pool.take()
    assert slot is not None
    pool.view(slot)[:] = bytes(pool.slot_bytes)
    grown = resident_bytes() - before
    assert grown < 3 * pool.slot_bytes, f"{grown} bytes committed for one slot of {pool.slot_bytes}"


def test_a_committed_pool_has_its_memory_and_one_in_use_is_not_overwritten() -> None:
    pool = SlotPool(8, 8 * HUGE_PAGE)
    before = resident_bytes()
    pool.commit()
    assert resident_bytes() - before > 0.9 * pool.capacity_bytes
    slot = pool.take()
    assert slot is not None
    with pytest.raises(IntegrityError, match="1 slots in use"):
        pool.commit()
