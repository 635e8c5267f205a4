"""Which expert lies in which slot, and who may be evicted. Moves no bytes; not thread-safe: one thread owns it.

A key that has a slot is in one state: resident (usable), loading (demand read running) or staged (speculative, read
or being read). Two rules share the pool of N slots, S of them reserved for staging:

* resident + loading <= N - S, the quota. Only ``adopt``, ``promote`` and ``set_staging`` may exceed it, and only as far
  as pins and running loads leave no victim; every later operation but ``abort`` and ``drop`` evicts the excess first.
* staged <= S for every new ``stage``; speculation never evicts a resident to get in.

Both together never exceed N: the pool has no other slots.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, KeysView, Mapping, Set
from enum import Enum
from time import perf_counter_ns

import numpy as np
from numpy.typing import NDArray

from foregate.errors import BudgetError, IntegrityError
from foregate.events import SILENCE, EventHub, ExpertMoved, Move
from foregate.experts.slots import SlotPool
from foregate.interfaces import EvictionPolicy
from foregate.types import ExpertKey


class SlotState(str, Enum):
    RESIDENT = "resident"
    LOADING = "loading"
    STAGED = "staged"


class _Evictable(Collection[ExpertKey]):
    """Residents without the pinned ones, in the order in which they became resident. A live view."""

    def __init__(self, residents: Mapping[ExpertKey, int], pins: Mapping[ExpertKey, int]) -> None:
        self._residents = residents
        self._pins = pins

    def __contains__(self, key: object) -> bool:
        return key in self._residents and key not in self._pins

    def __iter__(self) -> Iterator[ExpertKey]:
        return (key for key in self._residents if key not in self._pins)

    def __len__(self) -> int:
        return len(self._residents) - sum(key in self._residents for key in self._pins)


class ExpertCache:
    """The key <-> slot map over ``pool``, of which ``staging`` slots are kept for speculative loads. ``where`` [L, E],
    full of -1, will show the slot of each resident to what is compiled.

    Raises BudgetError if staging leaves no slot for residents. Operations on a key in the wrong state raise
    IntegrityError: they are bugs of the caller.
    """

    def __init__(
        self,
        pool: SlotPool,
        policy: EvictionPolicy,
        staging: int = 0,
        events: EventHub = SILENCE,
        where: NDArray[np.int32] | None = None,
    ) -> None:
        self.pool = pool
        self.policy = policy
        self._events = events
        self._where = where
        self.evictions = 0
        self.peak_resident = 0
        self._resident: dict[ExpertKey, int] = {}
        self._loading: dict[ExpertKey, int] = {}
        self._staged: dict[ExpertKey, int] = {}
        self._pins: dict[ExpertKey, int] = {}
        self._spent: dict[ExpertKey, None] = {}
        self._ghosts: dict[ExpertKey, None] = {}
        self._by_layer: dict[int, set[int]] = {}
        """Of all three states, experts by layer."""
        self._evictable = _Evictable(self._resident, self._pins)
        self._staging = self._checked(staging)

    # Asking

    @property
    def staging(self) -> int:
        """Slots reserved for speculative loads."""
        return self._staging

    @property
    def quota(self) -> int:
        """Slots that resident and demand-loading experts may occupy."""
        return self.pool.slots - self._staging

    def has_room_for_all(self, experts: int) -> bool:
        """Whether ``experts``, all there are, fit into the pool, and one more into the quota as it is."""
        return self.pool.slots >= experts and not self._excess(1)

    @property
    def staging_room(self) -> int:
        """How many ``stage`` calls would succeed now, without evicting any excess."""
        return max(0, min(self._staging - len(self._staged), self.pool.free))

    @property
    def resident(self) -> KeysView[ExpertKey]:
        """Resident keys, oldest first; a live view."""
        return self._resident.keys()

    @property
    def staged(self) -> KeysView[ExpertKey]:
        """Staged keys, oldest first; a live view."""
        return self._staged.keys()

    @property
    def loading(self) -> KeysView[ExpertKey]:
        """Keys with a demand load in flight; a live view."""
        return self._loading.keys()

    def lookup(self, key: ExpertKey) -> int | None:
        """Slot of a resident expert, else None. Does not count as an access: see ``hit``."""
        return self._resident.get(key)

    def state(self, key: ExpertKey) -> SlotState | None:
        """State of ``key``; None when it has no slot."""
        if key in self._resident:
            return SlotState.RESIDENT
        if key in self._staged:
            return SlotState.STAGED
        return SlotState.LOADING if key in self._loading else None

    def holds(self, key: ExpertKey) -> bool:
        """Whether ``key`` has a slot, in any state."""
        return key in self._resident or key in self._staged or key in self._loading

    def held(self, layer: int) -> Set[int]:
        """Experts of ``layer`` that have a slot, in any state; a live view."""
        return self._by_layer.setdefault(layer, set())

    def slot(self, key: ExpertKey) -> int | None:
        """Slot of ``key`` in any state."""
        for held in (self._resident, self._staged, self._loading):
            if key in held:
                return held[key]
        return None

    def squeezed_out(self, key: ExpertKey) -> bool:
        """Whether ``key`` was evicted so lately that the slots of the staging reserve would have kept it. Told once."""
        return self._ghosts.pop(key, self) is None

    # Doing

    def hit(self, key: ExpertKey) -> bool:
        """Whether ``key`` is resident; if so, this was an access. Loads need none: reserve, adopt and promote count."""
        if key not in self._resident:
            return False
        self._spent.pop(key, None)
        self.policy.touch(key)
        return True

    def pin(self, keys: Iterable[ExpertKey]) -> None:
        """Protect ``keys`` from eviction, whether they have a slot yet or not; counted."""
        for key in keys:
            self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, keys: Iterable[ExpertKey]) -> None:
        """Undo one ``pin`` of each key, then evict any excess over the quota."""
        for key in keys:
            count = self._pins.pop(key, 0)
            if count == 0:
                raise IntegrityError(f"{key} unpinned but not pinned")
            if count > 1:
                self._pins[key] = count - 1
        self._make_room(0)

    def reserve(self, key: ExpertKey) -> int | None:
        """A slot for a demand load of ``key``, evicting if need be; None when everything is pinned or loading.

        Pin the keys of a step before reserving for it: what ``commit`` makes resident is a victim like any other.
        """
        self._expect_absent(key)
        # The pool can be empty below the quota: staging was lowered while its slots were in use.
        if not self._make_room(1) or (self.pool.free == 0 and not self._evict()):
            return None
        self.policy.touch(key)
        slot = self._take(key, self._loading)
        self._tell(key, Move.LOADING)
        return slot

    def commit(self, key: ExpertKey) -> int:
        """The demand load of ``key`` is complete: it becomes resident. Its slot."""
        self._make_room(0)
        slot = self._leave(key, self._loading)
        self._settle(key, slot, Move.RESIDENT)
        return slot

    def abort(self, key: ExpertKey) -> None:
        """The demand load of ``key`` failed and nobody writes to its slot any more: the slot is free."""
        self._free(key, self._loading)
        self.policy.forget(key)
        self._tell(key, Move.ABORTED)

    def stage(self, key: ExpertKey) -> int | None:
        """A slot for a speculative load of ``key``; None when staging is full. Evicts only excess over the quota."""
        self._expect_absent(key)
        self._make_room(0)
        if not self.staging_room:
            return None
        slot = self._take(key, self._staged)
        self._tell(key, Move.STAGED)
        return slot

    def adopt(self, key: ExpertKey) -> int:
        """A staged expert, completely read, is used: it becomes resident. Its slot."""
        slot = self._enter_quota(key)
        self._settle(key, slot, Move.ADOPTED)
        return slot

    def promote(self, key: ExpertKey) -> int:
        """A staged expert is needed while still being read: a demand load from now on. Its slot; then ``commit``."""
        slot = self._enter_quota(key)
        self._loading[key] = slot
        self._tell(key, Move.PROMOTED)
        return slot

    def drop(self, key: ExpertKey) -> None:
        """A staged expert expired and nobody writes to its slot any more: the slot is free."""
        self._free(key, self._staged)
        self._tell(key, Move.DROPPED)

    def release(self, key: ExpertKey) -> None:
        """Let go of a resident that is of no further use; nothing to do where it has been evicted already."""
        if key in self._pins:
            raise IntegrityError(f"{key} released but pinned")
        if key in self._resident:
            self._free(key, self._resident)
            self.policy.forget(key)
            self._tell(key, Move.EVICTED)

    def spend(self, key: ExpertKey) -> None:
        """A resident that is worth less than any other, until it is touched: evicted before the policy is asked."""
        if key in self._resident:
            self._spent[key] = None

    def set_staging(self, staging: int) -> None:
        """Change the reserve, evicting residents to make room. Staged experts above a smaller reserve stay until used
        or dropped. Raises BudgetError if no slot would remain for residents."""
        self._staging = self._checked(staging)
        self._make_room(0)

    def clear(self) -> None:
        """Forget every resident, for a cold start; no evictions are counted. Raises IntegrityError unless idle, with
        nothing staged."""
        self.check_integrity(idle=True)
        if self._staged:
            raise IntegrityError(f"cleared with experts staged: {sorted(self._staged)}")
        for key in list(self._resident):
            self._free(key, self._resident)
            self.policy.forget(key)
            self._tell(key, Move.EVICTED)

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raises IntegrityError on any inconsistency; ``idle``: also when a pin or a demand load is left over."""
        self.pool.check_integrity()
        held = [*self._resident.items(), *self._loading.items(), *self._staged.items()]
        if len({key for key, _ in held}) != len(held) or len({slot for _, slot in held}) != len(held):
            raise IntegrityError(f"a key or a slot is held twice: {sorted(held)}")
        if len(held) != self.pool.used:
            raise IntegrityError(f"{len(held)} slots held by keys, {self.pool.used} taken from the pool")
        if {ExpertKey(layer, expert) for layer, there in self._by_layer.items() for expert in there} != dict(
            held
        ).keys():
            raise IntegrityError(f"experts by layer are not those that have a slot: {self._by_layer}")
        if self._where is not None:
            shown = {
                ExpertKey(int(layer), int(expert)) for layer, expert in zip(*np.nonzero(self._where >= 0), strict=True)
            }
            if shown != self._resident.keys() or any(self._where[key] != slot for key, slot in self._resident.items()):
                raise IntegrityError(f"shown as resident {sorted(shown)}, resident {sorted(self._resident)}")
        if any(count < 1 for count in self._pins.values()):
            raise IntegrityError(f"pins do not balance: {self._pins}")
        if idle and (self._pins or self._loading):
            raise IntegrityError(f"idle with pins {sorted(self._pins)} and loads {sorted(self._loading)}")
        if not self._spent.keys() <= self._resident.keys():
            raise IntegrityError(f"spent but not resident: {sorted(self._spent.keys() - self._resident.keys())}")
        if self._excess(0) and not self._pins and not self._loading:
            raise IntegrityError(f"{self._excess(0)} experts over the quota of {self.quota}, nothing pinned or loading")

    # Inside

    def _checked(self, staging: int) -> int:
        if not 0 <= staging < self.pool.slots:
            raise BudgetError(f"staging must leave at least 1 of {self.pool.slots} slots for residents, got {staging}")
        return staging

    def _excess(self, extra: int) -> int:
        return max(0, len(self._resident) + len(self._loading) + extra - self.quota)

    def _make_room(self, extra: int) -> bool:
        """Evict until ``extra`` more fit into the quota; False when there is no victim left."""
        while self._excess(extra):
            if not self._evict():
                return False
        return True

    def _evict(self) -> bool:
        if not self._evictable:
            return False
        spent = next((key for key in self._spent if key in self._evictable), None)
        key = self.policy.victim(self._evictable) if spent is None else spent
        self._free(key, self._resident)
        self.policy.forget(key)
        self.evictions += 1
        self._remember(key)
        self._tell(key, Move.EVICTED)
        return True

    def _enter_quota(self, key: ExpertKey) -> int:
        """Take ``key`` out of staging after making room for it, so that it cannot be its own victim."""
        slot = self._leave(key, self._staged)
        self._make_room(1)
        self.policy.touch(key)
        return slot

    def _remember(self, key: ExpertKey) -> None:
        """Keep the names of as many evicted experts as the reserve has slots: without it, they would be resident."""
        self._ghosts[key] = None
        while len(self._ghosts) > self._staging:
            del self._ghosts[next(iter(self._ghosts))]

    def _settle(self, key: ExpertKey, slot: int, move: Move) -> None:
        self._resident[key] = slot
        if self._where is not None:
            self._where[key] = slot
        self.peak_resident = max(self.peak_resident, len(self._resident))
        self._tell(key, move)

    def _tell(self, key: ExpertKey, move: Move) -> None:
        if self._events.on:
            self._events.emit(ExpertMoved(perf_counter_ns(), key, move))

    def _take(self, key: ExpertKey, held: dict[ExpertKey, int]) -> int:
        slot = self.pool.take()
        assert slot is not None, "the pool is empty although the quotas have room"
        held[key] = slot
        self._by_layer.setdefault(key.layer, set()).add(key.expert)
        return slot

    def _free(self, key: ExpertKey, held: dict[ExpertKey, int]) -> None:
        self.pool.give(self._leave(key, held))
        self._by_layer[key.layer].discard(key.expert)

    def _leave(self, key: ExpertKey, held: dict[ExpertKey, int]) -> int:
        if key not in held:
            raise IntegrityError(f"{key} is {getattr(self.state(key), 'value', 'absent')}, not in the expected state")
        self._spent.pop(key, None)
        if self._where is not None:
            self._where[key] = -1
        return held.pop(key)

    def _expect_absent(self, key: ExpertKey) -> None:
        if self.holds(key):
            raise IntegrityError(f"{key} has slot {self.slot(key)} already")
