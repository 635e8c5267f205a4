"""Cache and transfer together, as an engine drives them: whatever happens, what is used has the right bytes."""

from __future__ import annotations

import random

import pytest

from foregate.experts.cache import ExpertCache, SlotState
from foregate.experts.native_transfer import available
from foregate.experts.policy import POLICIES
from foregate.experts.slots import SlotPool
from foregate.experts.transfer import ThreadedTransfer
from foregate.interfaces import Ticket
from foregate.testing.faults import Fault, FaultyStore, Kind
from foregate.testing.native import native_over
from foregate.testing.stores import MemoryStore
from foregate.types import ExpertKey

SLOT = 8192
LAYERS, EXPERTS, CHOSEN = 3, 16, 4


class Driver:
    """A small engine: random routing, random speculation, late promotion, cancellation, waves when room is short."""

    def __init__(self, seed: int, policy: str, slots: int, staging: int, threads: int, native: bool) -> None:
        self.rng = random.Random(seed)
        self.good = MemoryStore(SLOT)
        plan = [Fault(Kind.EIO, rate=0.05), Fault(Kind.CORRUPT, rate=0.01), Fault(Kind.SLOW, rate=0.02, seconds=1e-3)]
        self.pool = SlotPool(slots, SLOT)
        self.cache = ExpertCache(self.pool, POLICIES.load(policy)(), staging)
        store = FaultyStore(MemoryStore(SLOT, chunks=2), plan, seed=seed)
        make = native_over if native else ThreadedTransfer
        self.transfer = make(store, self.pool, threads=threads, retries=6, timeout_s=20)
        self.tickets: dict[ExpertKey, Ticket] = {}
        self.dying: dict[ExpertKey, Ticket] = {}

    def step(self, layer: int) -> None:
        self.speculate((layer + 1) % LAYERS)
        needed = [ExpertKey(layer, expert) for expert in self.rng.sample(range(EXPERTS), CHOSEN)]
        waiting = list(needed)
        while waiting:
            wave = self.gather(waiting)
            assert wave, "no progress although nothing is pinned"
            for key in wave:
                self.use(key)
                waiting.remove(key)
            self.cache.check_integrity()
        self.give_up(layer)

    def speculate(self, layer: int) -> None:
        for expert in self.rng.sample(range(EXPERTS), CHOSEN):
            key = ExpertKey(layer, expert)
            if self.cache.state(key) is None and (slot := self.cache.stage(key)) is not None:
                self.tickets[key] = self.transfer.submit(key, slot, speculative=True)

    def gather(self, keys: list[ExpertKey]) -> list[ExpertKey]:
        """Pin and start as many of ``keys`` as there is room for."""
        wave = []
        for key in keys:
            self.cache.pin([key])
            if not self.start(key):
                self.cache.unpin([key])
                break
            wave.append(key)
        return wave

    def start(self, key: ExpertKey) -> bool:
        state = self.cache.state(key)
        if state is SlotState.RESIDENT:
            self.cache.hit(key)
        elif state is SlotState.STAGED:
            ticket = self.tickets.get(key) or self.dying.pop(key)
            if ticket.ok:
                self.cache.adopt(key)
            else:
                self.cache.promote(key)
                self.transfer.promote(ticket)
            self.tickets[key] = ticket
        else:
            slot = self.cache.reserve(key)
            if slot is None:
                return False
            self.tickets[key] = self.transfer.submit(key, slot, speculative=False)
        return True

    def use(self, key: ExpertKey) -> None:
        ticket = self.tickets.pop(key, None)
        if ticket is not None:
            self.transfer.wait(ticket)
        if self.cache.state(key) is SlotState.LOADING:
            self.cache.commit(key)
        slot = self.cache.lookup(key)
        assert slot is not None
        assert self.pool.view(slot) == self.good.expert_bytes(key)
        self.cache.unpin([key])

    def give_up(self, layer: int) -> None:
        """Cancel what was staged for ``layer`` and not used; slots come back once nobody writes to them."""
        for key in [key for key in self.tickets if key.layer == layer]:
            ticket = self.tickets.pop(key)
            self.transfer.cancel(ticket)
            self.dying[key] = ticket
        if self.rng.random() < 0.7:
            for key in [key for key, ticket in self.dying.items() if ticket.done]:
                del self.dying[key]
                self.cache.drop(key)


@pytest.mark.parametrize("native", [False, True], ids=["python", "native"])
@pytest.mark.parametrize("policy", POLICIES.names)
@pytest.mark.parametrize(("slots", "staging", "threads"), [(2, 1, 1), (5, 2, 4), (12, 4, 2), (48, 8, 4)])
def test_used_experts_are_exact_under_faults_speculation_and_pressure(
    policy: str, slots: int, staging: int, threads: int, native: bool
) -> None:
    if native and not available():
        pytest.skip("the compiled reader was not built")
    driver = Driver(seed=slots, policy=policy, slots=slots, staging=staging, threads=threads, native=native)
    with driver.transfer:
        for turn in range(120):
            if turn % 40 == 20:
                driver.cache.set_staging(driver.rng.randrange(slots))
            driver.step(turn % LAYERS)
    driver.cache.check_integrity(idle=True)
    assert driver.pool.peak_slots <= slots
