"""Random operations on the cache against a model that says only which states are allowed, for every policy."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from foregate.experts.cache import ExpertCache, SlotState
from foregate.experts.echo import Echo
from foregate.experts.policy import POLICIES
from foregate.experts.slots import SlotPool
from foregate.interfaces import EvictionPolicy
from foregate.types import ExpertKey

KEYS = st.builds(ExpertKey, st.integers(0, 1), st.integers(0, 4))


class Model:
    """Naive LRU/LFU/LFRU cache: lists and a scan, the rules of the module docstring in as few lines as possible.

    For ``echo`` (tests/test_echo.py has its rule) a second policy that must be told the same to say the same.
    """

    def __init__(self, name: str, slots: int, staging: int) -> None:
        self.name, self.slots, self.staging, self.now, self.evictions = name, slots, staging, 0, 0
        self.state: dict[ExpertKey, str] = {}
        self.uses: dict[ExpertKey, tuple[int, int]] = {}
        self.pins: list[ExpertKey] = []
        self.echo = Echo()

    def count(self, *states: str) -> int:
        return sum(state in states for state in self.state.values())

    def touch(self, key: ExpertKey) -> None:
        self.now += 1
        self.uses[key] = (self.uses.get(key, (0, 0))[0] + 1, self.now)
        self.echo.touch(key)

    def score(self, key: ExpertKey) -> tuple[float, int]:
        uses, last = self.uses[key]
        return {"lru": 0.0, "lfu": float(uses), "lfru": uses / (self.now - last + 1)}[self.name], last

    def leave(self, key: ExpertKey) -> None:
        del self.state[key]
        self.uses.pop(key, None)
        self.echo.forget(key)

    def evict(self) -> bool:
        victims = [key for key, state in self.state.items() if state == "resident" and key not in self.pins]
        if victims:
            self.leave(self.echo.victim(victims) if self.name == "echo" else min(victims, key=self.score))
            self.evictions += 1
        return bool(victims)

    def room(self, extra: int) -> bool:
        while self.count("resident", "loading") + extra > self.slots - self.staging:
            if not self.evict():
                return False
        return True

    def reserve(self, key: ExpertKey) -> bool:
        if not self.room(1) or (len(self.state) == self.slots and not self.evict()):
            return False
        self.state[key] = "loading"
        self.touch(key)
        return True

    def stage(self, key: ExpertKey) -> bool:
        self.room(0)
        if self.count("staged") >= self.staging or len(self.state) == self.slots:
            return False
        self.state[key] = "staged"
        return True

    def enter(self, key: ExpertKey, state: str) -> None:
        del self.state[key]
        self.room(1)
        self.state[key] = state
        self.touch(key)


class CacheMachine(RuleBasedStateMachine):
    policy = "lru"

    @initialize(slots=st.integers(1, 7), data=st.data())
    def build(self, slots: int, data: st.DataObject) -> None:
        staging = data.draw(st.integers(0, slots - 1))
        policy: EvictionPolicy = POLICIES.load(self.policy)()
        self.cache = ExpertCache(SlotPool(slots, 4096), policy, staging)
        self.model = Model(self.policy, slots, staging)

    def keys(self, state: str) -> list[ExpertKey]:
        return [key for key, held in self.model.state.items() if held == state]

    @rule(key=KEYS, speculative=st.booleans())
    def ask(self, key: ExpertKey, speculative: bool) -> None:
        if key not in self.model.state:
            slot = self.cache.stage(key) if speculative else self.cache.reserve(key)
            assert (slot is not None) == (self.model.stage(key) if speculative else self.model.reserve(key))

    @precondition(lambda self: self.keys("loading"))
    @rule(data=st.data(), good=st.booleans())
    def loaded(self, data: st.DataObject, good: bool) -> None:
        key = data.draw(st.sampled_from(self.keys("loading")))
        if good:
            self.cache.commit(key)
            self.model.room(0)
            self.model.state[key] = "resident"
        else:
            self.cache.abort(key)
            self.model.leave(key)

    @precondition(lambda self: self.keys("staged"))
    @rule(data=st.data(), fate=st.sampled_from(["adopt", "promote", "drop"]))
    def decide_staged(self, data: st.DataObject, fate: str) -> None:
        key = data.draw(st.sampled_from(self.keys("staged")))
        getattr(self.cache, fate)(key)
        if fate == "drop":
            self.model.leave(key)
        else:
            self.model.enter(key, "resident" if fate == "adopt" else "loading")

    @precondition(lambda self: self.keys("resident"))
    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.keys("resident")))
        assert self.cache.hit(key)
        self.model.touch(key)

    @rule(keys=st.lists(KEYS, max_size=4))
    def pin(self, keys: list[ExpertKey]) -> None:
        self.cache.pin(keys)
        self.model.pins += keys

    @precondition(lambda self: self.model.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.model.pins))
        self.cache.unpin([key])
        self.model.pins.remove(key)
        self.model.room(0)

    @rule(data=st.data())
    def set_staging(self, data: st.DataObject) -> None:
        staging = data.draw(st.integers(0, self.model.slots - 1))
        self.cache.set_staging(staging)
        self.model.staging = staging
        self.model.room(0)

    @invariant()
    def same_as_the_model(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        states = {state: set(self.keys(state.value)) for state in SlotState}
        assert set(self.cache.resident) == states[SlotState.RESIDENT]
        assert set(self.cache.loading) == states[SlotState.LOADING]
        assert set(self.cache.staged) == states[SlotState.STAGED]
        assert self.cache.pool.used == len(self.model.state) <= self.model.slots
        assert self.cache.evictions == self.model.evictions

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.unpin(self.model.pins)
            for key in list(self.cache.loading):
                self.cache.abort(key)
            self.cache.check_integrity(idle=True)


@pytest.mark.parametrize("name", POLICIES.names)
def test_any_sequence_of_operations_agrees_with_the_model(name: str) -> None:
    machine = type(f"CacheMachine_{name}", (CacheMachine,), {"policy": name})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
