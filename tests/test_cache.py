"""The cache, state by state: what each operation does, refuses and leaves behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from foregate.errors import BudgetError, IntegrityError
from foregate.experts.cache import ExpertCache, SlotState
from foregate.experts.policy import Lfu, Lru
from foregate.experts.slots import SlotPool
from foregate.types import ExpertKey

A, B, C, D, E = (ExpertKey(0, expert) for expert in range(5))


@pytest.fixture
def cache() -> Iterator[ExpertCache]:
    """Four slots, one of them for staging."""
    made = ExpertCache(SlotPool(4, 4096), Lru(), staging=1)
    yield made
    made.check_integrity()


def load(cache: ExpertCache, *keys: ExpertKey) -> None:
    for key in keys:
        assert cache.reserve(key) is not None
        cache.commit(key)


def test_a_demand_load_goes_through_loading_to_resident(cache: ExpertCache) -> None:
    slot = cache.reserve(A)
    assert slot is not None
    assert (cache.state(A), cache.lookup(A), cache.slot(A)) == (SlotState.LOADING, None, slot)
    assert cache.commit(A) == slot
    assert (cache.state(A), cache.lookup(A)) == (SlotState.RESIDENT, slot)
    assert (cache.state(B), cache.lookup(B), cache.slot(B)) == (None, None, None)


def test_what_a_layer_holds_counts_every_state(cache: ExpertCache) -> None:
    other, held = ExpertKey(1, 0), cache.held(0)
    load(cache, A, other)
    cache.stage(B)
    cache.reserve(C)
    assert (set(held), set(cache.held(1)), set(cache.held(2))) == ({0, 1, 2}, {0}, set())
    cache.drop(B)
    cache.abort(C)
    cache.release(A)
    assert (set(held), set(cache.held(1))) == (set(), {0})


def test_a_failed_load_leaves_nothing(cache: ExpertCache) -> None:
    cache.reserve(A)
    cache.abort(A)
    assert cache.state(A) is None
    assert cache.pool.used == 0
    load(cache, A)


def test_the_least_recently_used_goes_first_and_is_counted(cache: ExpertCache) -> None:
    load(cache, A, B, C)
    cache.hit(A)
    load(cache, D)
    assert set(cache.resident) == {A, C, D}
    assert (cache.evictions, cache.peak_resident) == (1, 3)


@pytest.mark.parametrize("leave", ["evicted", "aborted"])
def test_what_left_the_cache_comes_back_without_its_frequency(leave: str) -> None:
    cache = ExpertCache(SlotPool(2, 4096), Lfu())
    if leave == "evicted":
        load(cache, A)
        cache.hit(A)
        cache.hit(A)
        cache.set_staging(1)
        load(cache, B)
        cache.set_staging(0)
    else:
        for _ in range(2):
            cache.reserve(A)
            cache.abort(A)
        load(cache, B)
    cache.hit(B)
    load(cache, A, C)
    assert set(cache.resident) == {B, C}, "A was used once since it came back, B twice"


def test_lookup_does_not_count_as_an_access(cache: ExpertCache) -> None:
    load(cache, A, B, C)
    cache.lookup(A)
    load(cache, D)
    assert A not in cache.resident


def test_demand_never_uses_idle_staging_slots(cache: ExpertCache) -> None:
    load(cache, A, B, C, D)
    assert (cache.pool.used, cache.pool.free) == (3, 1)


def test_pinned_experts_stay_and_reserve_says_none(cache: ExpertCache) -> None:
    load(cache, A, B, C)
    cache.pin([A, B, C])
    assert cache.reserve(D) is None
    cache.unpin([B])
    assert cache.reserve(D) is not None
    assert cache.state(B) is None
    cache.unpin([A, C])


def test_pins_are_counted(cache: ExpertCache) -> None:
    load(cache, A, B, C)
    cache.pin([A, A, B, C])
    cache.unpin([A])
    assert cache.reserve(D) is None
    cache.unpin([A])
    assert cache.reserve(D) is not None
    cache.unpin([B, C])
    with pytest.raises(IntegrityError, match="not pinned"):
        cache.unpin([A])


def test_a_pin_may_come_before_the_expert(cache: ExpertCache) -> None:
    cache.pin([A])
    load(cache, A, B, C, D, E)
    assert A in cache.resident
    cache.unpin([A])


def test_loads_in_flight_are_no_victims(cache: ExpertCache) -> None:
    for key in (A, B, C):
        cache.reserve(key)
    assert cache.reserve(D) is None


def test_staging_never_evicts_and_has_its_own_limit(cache: ExpertCache) -> None:
    load(cache, A, B, C)
    assert cache.staging_room == 1
    assert cache.stage(D) is not None
    assert (cache.state(D), cache.lookup(D), cache.staging_room) == (SlotState.STAGED, None, 0)
    assert cache.stage(E) is None
    assert (set(cache.resident), cache.evictions) == ({A, B, C}, 0)
    cache.drop(D)
    assert cache.stage(E) is not None


def test_adopting_evicts_the_victim_and_gives_staging_its_room_back(cache: ExpertCache) -> None:
    load(cache, A, B, C)
    slot = cache.stage(D)
    assert cache.adopt(D) == slot
    assert set(cache.resident) == {B, C, D}
    assert cache.staging_room == 1


def test_adopting_with_everything_pinned_exceeds_the_quota_until_the_unpin(cache: ExpertCache) -> None:
    load(cache, A, B, C)
    cache.pin([A, B, C])
    cache.stage(D)
    cache.adopt(D)
    assert set(cache.resident) == {A, B, C, D}
    cache.pin([D])
    assert cache.stage(E) is None, "the pool has no other slot"
    assert cache.reserve(E) is None
    cache.unpin([A, B, C, D])
    assert set(cache.resident) == {B, C, D}
    cache.check_integrity(idle=True)


def test_a_late_speculation_becomes_a_demand_load(cache: ExpertCache) -> None:
    load(cache, A, B, C)
    slot = cache.stage(D)
    assert cache.promote(D) == slot
    assert cache.state(D) is SlotState.LOADING
    assert set(cache.resident) == {B, C}
    assert cache.commit(D) == slot


def test_more_staging_at_run_time_evicts_less_staging_lets_residents_grow(cache: ExpertCache) -> None:
    load(cache, A, B, C)
    cache.set_staging(3)
    assert list(cache.resident) == [C]
    assert cache.staging_room == 3
    cache.set_staging(0)
    load(cache, A, B, D)
    assert (len(cache.resident), cache.staging_room) == (4, 0)


def test_staging_lowered_while_full_keeps_the_pool_bound(cache: ExpertCache) -> None:
    cache.set_staging(3)
    load(cache, A)
    for key in (B, C, D):
        cache.stage(key)
    cache.set_staging(0)
    cache.pin([A])
    assert cache.reserve(E) is None, "no slot is free although the quota has room"
    cache.unpin([A])
    assert cache.reserve(E) is not None
    assert cache.state(A) is None


def test_more_staging_with_pinned_residents_waits_for_the_unpin(cache: ExpertCache) -> None:
    load(cache, A, B, C)
    cache.pin([A, B, C])
    cache.set_staging(3)
    assert len(cache.resident) == 3
    assert cache.stage(D) is not None
    assert cache.stage(E) is None
    cache.unpin([A, B, C])
    assert len(cache.resident) == 1
    assert cache.stage(E) is not None


def test_more_staging_with_loads_in_flight_is_settled_by_their_commits(cache: ExpertCache) -> None:
    for key in (A, B, C):
        cache.reserve(key)
    cache.set_staging(3)
    for key in (A, B, C):
        cache.commit(key)
        cache.check_integrity()
    assert list(cache.resident) == [C]


@pytest.mark.parametrize("staging", [-1, 4, 5])
def test_staging_must_leave_a_slot_for_residents(cache: ExpertCache, staging: int) -> None:
    with pytest.raises(BudgetError, match=str(staging)):
        cache.set_staging(staging)
    with pytest.raises(BudgetError, match=str(staging)):
        ExpertCache(SlotPool(4, 4096), Lru(), staging)
    assert cache.staging == 1


def test_operations_in_the_wrong_state_are_refused_and_change_nothing(cache: ExpertCache) -> None:
    load(cache, A)
    cache.reserve(B)
    cache.stage(C)
    wrong = [
        (cache.reserve, [A, B, C]),
        (cache.stage, [A, B, C]),
        (cache.commit, [A, C, D]),
        (cache.abort, [A, C, D]),
        (cache.adopt, [A, B, D]),
        (cache.promote, [A, B, D]),
        (cache.drop, [A, B, D]),
    ]
    for operation, keys in wrong:
        for key in keys:
            with pytest.raises(IntegrityError):
                operation(key)  # type: ignore[operator]
    assert [cache.hit(key) for key in (A, B, C, D)] == [True, False, False, False]
    states = [cache.state(key) for key in (A, B, C, D)]
    assert states == [SlotState.RESIDENT, SlotState.LOADING, SlotState.STAGED, None]


def test_clearing_forgets_residents_and_their_history_and_nothing_else(cache: ExpertCache) -> None:
    load(cache, A, B, C)
    cache.stage(D)
    with pytest.raises(IntegrityError, match="staged"):
        cache.clear()
    cache.drop(D)
    cache.pin([A])
    with pytest.raises(IntegrityError, match="idle with pins"):
        cache.clear()
    cache.unpin([A])
    cache.clear()
    assert (len(cache.resident), cache.pool.used, cache.evictions) == (0, 0, 0)
    load(cache, D, A, B, C)
    assert D not in cache.resident


def test_idle_integrity_refuses_leftover_pins_and_loads(cache: ExpertCache) -> None:
    cache.check_integrity(idle=True)
    cache.pin([A])
    with pytest.raises(IntegrityError, match="idle with pins"):
        cache.check_integrity(idle=True)
    cache.unpin([A])
    cache.reserve(A)
    with pytest.raises(IntegrityError, match="idle with pins"):
        cache.check_integrity(idle=True)
    cache.abort(A)


def test_integrity_check_sees_a_leaked_and_a_shared_slot() -> None:
    cache = ExpertCache(SlotPool(4, 4096), Lru())
    cache.pool.take()
    with pytest.raises(IntegrityError, match="taken from the pool"):
        cache.check_integrity()
    load(cache, A)
    cache._staged[B] = cache._resident[A]
    with pytest.raises(IntegrityError, match="held twice"):
        cache.check_integrity()
