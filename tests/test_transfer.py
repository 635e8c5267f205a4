"""Transfers: exact bytes, order of reads, promotion, cancellation in every state, counters, threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from time import sleep

import pytest

from foregate.errors import TransferError
from foregate.experts.native_transfer import available
from foregate.experts.slots import SlotPool
from foregate.experts.sync_transfer import SyncTransfer
from foregate.experts.transfer import ThreadedTransfer
from foregate.testing.native import native_over
from foregate.testing.stores import MemoryStore
from foregate.testing.transfers import EVERY_KIND, IN_C, IN_PYTHON, PATIENCE_S, Make, until
from foregate.types import ExpertKey

SLOT = 16384
A, B, C = (ExpertKey(0, expert) for expert in range(3))

built = pytest.mark.skipif(not available(), reason="the compiled reader was not built")


@pytest.fixture(params=[ThreadedTransfer, pytest.param(native_over, marks=built)], ids=["python", "native"])
def threaded(request: pytest.FixtureRequest) -> Make:
    """Transfers with threads of their own, as many as asked for."""
    made: Make = request.param
    return made


@pytest.fixture(params=[*IN_PYTHON, *(pytest.param(kind, marks=built) for kind in IN_C)])
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = EVERY_KIND[request.param]
    return made


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    before = set(threading.enumerate())  # other tests' engines may not have been collected yet
    yield
    until(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith("foregate-read")])


class GatedStore(MemoryStore):
    """Every read of a chunk is logged in ``started``, then waits until ``allow`` lets it through."""

    def __init__(self, chunks: int) -> None:
        super().__init__(SLOT, chunks=chunks)
        self.started: list[tuple[ExpertKey, int]] = []
        self._gate = threading.Semaphore(0)

    def count(self, key: ExpertKey, index: int) -> None:
        self.started.append((key, index))
        assert self._gate.acquire(timeout=PATIENCE_S)
        super().count(key, index)

    def allow(self, reads: int = 1000) -> None:
        for _ in range(reads):
            self._gate.release()

    def until_started(self, reads: int) -> None:
        until(lambda: len(self.started) >= reads)


def all_chunks(key: ExpertKey, first: int = 0, chunks: int = 4) -> list[tuple[ExpertKey, int]]:
    return [(key, index) for index in range(first, chunks)]


def test_bytes_are_exact_for_random_keys(make: Make) -> None:
    rng = random.Random(3)
    store, pool = MemoryStore(SLOT, chunks=4), SlotPool(8, SLOT)
    with make(store, pool) as transfer:
        for _ in range(30):
            keys = [ExpertKey(rng.randrange(10), rng.randrange(64)) for _ in range(8)]
            tickets = [transfer.submit(key, slot, speculative=rng.random() < 0.5) for slot, key in enumerate(keys)]
            waiting = list(tickets)
            while waiting:
                ticket = transfer.wait_any(waiting)
                assert ticket.done
                waiting.remove(ticket)
            for ticket in tickets:
                transfer.wait(ticket)
                assert ticket.ok
                assert pool.view(ticket.slot) == store.expert_bytes(ticket.key)
        stats = transfer.stats()
    assert sum(store.reads.values()) == stats.chunks == 30 * 8 * 4
    assert stats.demand_bytes + stats.prefetch_bytes == 30 * 8 * SLOT
    assert (stats.retries, stats.rereads, stats.failed, stats.cancelled) == (0, 0, 0, 0)
    assert 0 < stats.active_s <= stats.busy_s or 0 < stats.busy_s <= stats.active_s


def test_chunks_of_one_expert_are_read_in_parallel(threaded: Make) -> None:
    store = GatedStore(chunks=4)
    with threaded(store, SlotPool(2, SLOT), threads=4) as transfer:
        first = transfer.submit(A, 0, speculative=False)
        transfer.submit(B, 1, speculative=False)
        store.until_started(4)
        assert sorted(store.started) == all_chunks(A)
        store.allow()
        transfer.wait(first)


def test_demand_overtakes_what_is_unread_of_a_speculation(threaded: Make) -> None:
    store = GatedStore(chunks=4)
    with threaded(store, SlotPool(3, SLOT), threads=1) as transfer:
        speculations = [transfer.submit(key, slot, speculative=True) for slot, key in enumerate((A, B))]
        store.until_started(1)
        demand = transfer.submit(C, 2, speculative=False)
        store.allow()
        transfer.wait(demand)
        for ticket in speculations:
            transfer.wait(ticket)
    assert store.started == [(A, 0), *all_chunks(C), *all_chunks(A, 1), *all_chunks(B)]


def test_each_class_is_served_in_order_of_submission(threaded: Make) -> None:
    store = GatedStore(chunks=1)
    keys = [ExpertKey(1, expert) for expert in range(8)]
    with threaded(store, SlotPool(9, SLOT), threads=1) as transfer:
        blocker = transfer.submit(A, 8, speculative=False)
        store.until_started(1)
        tickets = [transfer.submit(key, slot, speculative=slot % 2 == 0) for slot, key in enumerate(keys)]
        store.allow()
        transfer.wait(blocker)
        until(lambda: all(ticket.done for ticket in tickets))
    assert [key for key, _ in store.started] == [A, *keys[1::2], *keys[::2]]


def test_a_late_prefetch_is_promoted_and_read_once(threaded: Make) -> None:
    store, pool = GatedStore(chunks=4), SlotPool(3, SLOT)
    with threaded(store, pool, threads=1) as transfer:
        first, late = (transfer.submit(key, slot, speculative=True) for slot, key in enumerate((A, B)))
        store.until_started(1)
        transfer.promote(late)
        transfer.promote(late)
        store.allow()
        transfer.wait(late)
        assert pool.view(late.slot) == store.expert_bytes(B)
        transfer.wait(first)
        stats = transfer.stats()
    assert store.started == [(A, 0), *all_chunks(B), *all_chunks(A, 1)]
    assert (stats.prefetch_bytes, stats.demand_bytes) == (2 * SLOT, 0), "bytes stay in the class they were issued in"
    assert late.speculative


def test_waiting_promotes(threaded: Make) -> None:
    store = GatedStore(chunks=2)
    with threaded(store, SlotPool(2, SLOT), threads=1) as transfer:
        first, late = (transfer.submit(key, slot, speculative=True) for slot, key in enumerate((A, B)))
        store.until_started(1)
        threading.Timer(0.05, store.allow).start()
        assert transfer.wait_any([late]) is late
        transfer.wait(first)
    assert store.started == [(A, 0), (B, 0), (B, 1), (A, 1)]


def test_wait_any_returns_what_has_ended(threaded: Make) -> None:
    store = GatedStore(chunks=1)
    with threaded(store, SlotPool(2, SLOT), threads=1) as transfer:
        tickets = [transfer.submit(key, slot, speculative=False) for slot, key in enumerate((A, B))]
        store.allow(1)
        assert transfer.wait_any(tickets[::-1]) is tickets[0]
        store.allow(1)
        assert transfer.wait_any(tickets[1:]) is tickets[1]


def test_cancelling_what_is_queued_frees_the_slot_at_once_and_reads_nothing(threaded: Make) -> None:
    store = GatedStore(chunks=4)
    with threaded(store, SlotPool(2, SLOT), threads=1) as transfer:
        running, queued = (transfer.submit(key, slot, speculative=True) for slot, key in enumerate((A, B)))
        store.until_started(1)
        assert transfer.cancel(queued)
        assert transfer.cancel(queued), "cancelling again says the same"
        assert queued.done
        assert not queued.ok
        store.allow()
        transfer.wait(running)
        with pytest.raises(TransferError, match=r"expert 0\.1 waited for after it was cancelled"):
            transfer.wait(queued)
        assert transfer.stats().cancelled == 1
    assert store.started == all_chunks(A)


def test_cancelling_what_is_being_read_frees_the_slot_when_the_chunk_ends(threaded: Make) -> None:
    store = GatedStore(chunks=4)
    with threaded(store, SlotPool(2, SLOT), threads=1) as transfer:
        ticket = transfer.submit(A, 0, speculative=True)
        store.until_started(1)
        assert not transfer.cancel(ticket)
        assert not transfer.cancel(ticket)
        assert not ticket.done
        store.allow(1)
        until(lambda: ticket.done)
        assert transfer.cancel(ticket)
        assert transfer.stats().cancelled == 1
    assert store.started == [(A, 0)]


def test_cancelling_what_is_complete_keeps_it_complete(make: Make) -> None:
    with make(MemoryStore(SLOT), SlotPool(1, SLOT)) as transfer:
        ticket = transfer.submit(A, 0, speculative=True)
        transfer.wait(ticket)
        assert transfer.cancel(ticket)
        assert ticket.ok
        assert transfer.stats().cancelled == 0


def test_a_demand_can_be_cancelled_too(threaded: Make) -> None:
    store = GatedStore(chunks=4)
    with threaded(store, SlotPool(2, SLOT), threads=1) as transfer:
        blocker, ticket = (transfer.submit(key, slot, speculative=False) for slot, key in enumerate((A, B)))
        store.until_started(1)
        assert transfer.cancel(ticket)
        store.allow()
        transfer.wait(blocker)
    assert store.started == all_chunks(A)


@pytest.mark.parametrize("drained", [False, True])
@pytest.mark.parametrize("read_before", [1, 4])
def test_a_cancelled_transfer_is_revived_without_reading_twice(drained: bool, read_before: int, threaded: Make) -> None:
    store, pool = GatedStore(chunks=4), SlotPool(1, SLOT)
    with threaded(store, pool, threads=1) as transfer:
        ticket = transfer.submit(A, 0, speculative=True)
        store.allow(read_before - 1)
        store.until_started(read_before)
        assert not transfer.cancel(ticket)
        if drained:
            store.allow(1)
            until(lambda: ticket.done)
        transfer.promote(ticket)
        store.allow()
        transfer.wait(ticket)
        assert ticket.ok
        assert transfer.stats().cancelled == 0
    assert pool.view(0) == store.expert_bytes(A)
    assert store.started == all_chunks(A)


def test_a_cancelled_lazy_read_can_be_revived() -> None:
    store, pool = MemoryStore(SLOT), SlotPool(1, SLOT)
    with SyncTransfer(store, pool, lazy=True) as transfer:
        ticket = transfer.submit(A, 0, speculative=True)
        assert transfer.cancel(ticket)
        assert ticket.done
        with pytest.raises(TransferError, match="cancelled"):
            transfer.wait(ticket)
        transfer.promote(ticket)
        transfer.wait(ticket)
        assert transfer.stats().cancelled == 0
    assert pool.view(0) == store.expert_bytes(A)


def test_close_drops_the_queue_ends_the_threads_and_refuses_more(threaded: Make) -> None:
    store = GatedStore(chunks=2)
    transfer = threaded(store, SlotPool(2, SLOT), threads=1)
    running, queued = (transfer.submit(key, slot, speculative=False) for slot, key in enumerate((A, B)))
    store.until_started(1)
    threading.Timer(0.05, store.allow).start()
    transfer.close()
    transfer.close()
    assert store.started == [(A, 0)]
    for ticket in (running, queued):
        with pytest.raises(TransferError, match=r"expert 0\.. *: the transfer was closed"):
            transfer.wait(ticket)
    with pytest.raises(TransferError, match="closed transfer"):
        transfer.submit(C, 0, speculative=False)


def test_close_does_not_wait_for_ever_for_a_hanging_read(monkeypatch: pytest.MonkeyPatch, threaded: Make) -> None:
    monkeypatch.setattr("foregate.experts.transfer.JOIN_S", 0.05)
    monkeypatch.setattr("foregate.experts.native_transfer.JOIN_S", 0.05)
    store = GatedStore(chunks=1)
    transfer = threaded(store, SlotPool(1, SLOT), threads=2)
    transfer.submit(A, 0, speculative=False)
    store.until_started(1)
    transfer.close()
    store.allow()


def test_no_slot_is_written_after_done_under_random_promotion_and_cancellation(threaded: Make) -> None:
    rng = random.Random(5)
    store, pool = MemoryStore(SLOT, chunks=4), SlotPool(16, SLOT)
    marks: dict[int, bytes] = {}
    with threaded(store, pool, threads=4) as transfer:
        for turn in range(150):
            tickets = [transfer.submit(ExpertKey(turn % 7, slot), slot, speculative=slot > 2) for slot in range(16)]
            for ticket in rng.sample(tickets[3:], 8):
                transfer.cancel(ticket)
            promoted = rng.sample(tickets[3:], 4)
            for ticket in promoted:
                transfer.promote(ticket)
            for ticket in [*tickets[:3], *promoted]:
                transfer.wait(ticket)
                assert pool.view(ticket.slot) == store.expert_bytes(ticket.key)
            until(lambda: all(ticket.done for ticket in tickets))  # noqa: B023 (called here, not later)
            marks = {ticket.slot: bytes([turn % 251]) * SLOT for ticket in tickets}
            for slot, mark in marks.items():
                pool.view(slot)[:] = mark
            if turn % 10 == 0:
                sleep(1e-3)
            assert all(pool.view(slot) == mark for slot, mark in marks.items())
