"""Transfers over a store that fails: retries, where errors surface and what they name, time-outs, no poisoning."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterator

import pytest

from foregate.errors import CheckpointError, ExpertReadError, PackError, TransferError
from foregate.experts.native_transfer import available
from foregate.experts.slots import SlotPool
from foregate.experts.transfer import ThreadedTransfer
from foregate.interfaces import ExpertRead
from foregate.testing.faults import Fault, FaultyStore, Kind
from foregate.testing.native import native_over
from foregate.testing.stores import MemoryRead, MemoryStore
from foregate.testing.transfers import EVERY_KIND, IN_C, IN_PYTHON, PATIENCE_S, Make, until
from foregate.types import ExpertKey

SLOT = 16384
A, B = ExpertKey(0, 0), ExpertKey(3, 17)

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


@pytest.fixture(params=IN_PYTHON.values(), ids=IN_PYTHON.keys())
def of_python(request: pytest.FixtureRequest) -> Make:
    """Transfers that let the store verify."""
    made: Make = request.param
    return made


@pytest.fixture(params=["1 thread", "4 threads", "sync", pytest.param("4 native threads", marks=built)])
def eager(request: pytest.FixtureRequest) -> Make:
    """Transfers that read a speculation before anybody waits for it."""
    made: Make = EVERY_KIND[request.param]
    return made


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    before = set(threading.enumerate())  # other tests' engines may not have been collected yet
    yield
    until(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith("foregate-read")])


def faulty(*plan: Fault, chunks: int = 4, verify: bool = True, seed: int = 0) -> FaultyStore:
    return FaultyStore(MemoryStore(SLOT, chunks=chunks, verify=verify), plan, seed=seed)


def skip_unverified(make: Make, verify: bool) -> None:
    if not verify and make in IN_C.values():
        pytest.skip("the native transfer takes only experts with a checksum")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("seed", [1, 2])
def test_bytes_are_exact_under_every_recoverable_fault(make: Make, seed: int, verify: bool) -> None:
    rng = random.Random(seed)
    plan = [
        Fault(Kind.EIO, rate=0.15),
        Fault(Kind.SHORT, rate=0.05),
        Fault(Kind.CORRUPT, rate=0.05),
        Fault(Kind.SLOW, rate=0.05, seconds=1e-3),
    ]
    skip_unverified(make, verify)
    store, pool = faulty(*plan, verify=verify, seed=seed), SlotPool(8, SLOT)
    good = MemoryStore(SLOT)
    with make(store, pool, retries=9) as transfer:
        for _ in range(5):
            keys = [ExpertKey(rng.randrange(10), rng.randrange(64)) for _ in range(8)]
            tickets = [transfer.submit(key, slot, speculative=slot % 2 == 0) for slot, key in enumerate(keys)]
            for ticket in tickets:
                transfer.wait(ticket)
                assert pool.view(ticket.slot) == good.expert_bytes(ticket.key)
        stats = transfer.stats()
    assert stats.retries == store.injected[Kind.EIO] + store.injected[Kind.SHORT] > 0
    assert 0 < stats.rereads <= store.injected[Kind.CORRUPT]
    assert stats.failed == 0


def test_a_chunk_that_fails_thrice_is_read_the_fourth_time(make: Make) -> None:
    store = faulty(Fault(Kind.EIO, keys=[A], chunks=[2], first=3))
    with make(store, SlotPool(1, SLOT)) as transfer:
        transfer.wait(transfer.submit(A, 0, speculative=False))
        stats = transfer.stats()
    assert (stats.retries, stats.chunks, stats.demand_bytes) == (3, 4, SLOT)


def test_a_permanent_error_is_raised_once_waited_for_and_names_file_offset_and_expert(make: Make) -> None:
    store, pool = faulty(Fault(Kind.EIO, keys=[B], chunks=[1])), SlotPool(2, SLOT)
    with make(store, pool) as transfer:
        bad = transfer.submit(B, 0, speculative=False)
        good = transfer.submit(A, 1, speculative=False)
        transfer.wait(good)
        for _ in range(2):
            with pytest.raises(ExpertReadError, match=r"^memory, offset 4096, expert 3\.17: .*Input/output") as got:
                transfer.wait(bad)
            assert isinstance(got.value.__cause__, OSError)
        assert bad.done
        assert not bad.ok
        stats = transfer.stats()
    assert (stats.failed, stats.failed_prefetch, stats.retries) == (1, 0, 3)
    assert store.injected[Kind.EIO] == 4


def test_a_read_of_no_chunks_is_an_error_at_once(of_python: Make) -> None:
    """Nobody would take its last chunk: the wait had no end."""
    with of_python(MemoryStore(SLOT, chunks=0), SlotPool(1, SLOT)) as transfer:
        for speculative in (True, False):
            ticket = transfer.submit(B, 0, speculative=speculative)
            assert ticket.done
            with pytest.raises(TransferError, match=r"expert 3\.17: the store plans a read of 0 chunks"):
                transfer.wait(ticket)


def test_a_bad_checksum_reads_the_whole_expert_again(make: Make) -> None:
    store, pool = faulty(Fault(Kind.CORRUPT, chunks=[0], first=1)), SlotPool(1, SLOT)
    with make(store, pool) as transfer:
        transfer.wait(transfer.submit(A, 0, speculative=False))
        stats = transfer.stats()
    assert (stats.rereads, stats.chunks, stats.demand_bytes) == (1, 8, 2 * SLOT)
    assert pool.view(0) == MemoryStore(SLOT).expert_bytes(A)


@pytest.mark.parametrize("verify", [True, False])
def test_bytes_that_never_match_are_an_error_never_wrong_bytes(make: Make, verify: bool) -> None:
    skip_unverified(make, verify)
    store = faulty(Fault(Kind.CORRUPT, keys=[B]), verify=verify)
    with make(store, SlotPool(1, SLOT)) as transfer:
        with pytest.raises(ExpertReadError, match=r"memory, offset 0, expert 3\.17"):
            transfer.wait(transfer.submit(B, 0, speculative=False))
        stats = transfer.stats()
    assert (stats.rereads, stats.chunks, stats.failed) == (3, 16, 1)


def test_a_failed_speculation_is_silent_and_does_not_poison_a_later_demand(eager: Make) -> None:
    store, pool = faulty(Fault(Kind.EIO, first=4), chunks=1), SlotPool(2, SLOT)
    with eager(store, pool) as transfer:
        failed = transfer.submit(A, 0, speculative=True)
        until(lambda: failed.done)
        assert not failed.ok
        transfer.wait(transfer.submit(A, 1, speculative=False))
        stats = transfer.stats()
    assert (stats.failed, stats.failed_prefetch) == (1, 1)
    assert pool.view(1) == MemoryStore(SLOT).expert_bytes(A)


def test_a_failed_speculation_starts_again_when_promoted(eager: Make) -> None:
    store, pool = faulty(Fault(Kind.EIO, chunks=[1], first=4)), SlotPool(1, SLOT)
    with eager(store, pool) as transfer:
        ticket = transfer.submit(A, 0, speculative=True)
        until(lambda: ticket.done)
        transfer.promote(ticket)
        transfer.wait(ticket)
        assert ticket.ok
    assert pool.view(0) == MemoryStore(SLOT).expert_bytes(A)


def test_a_speculation_that_fails_for_good_surfaces_only_at_its_wait(eager: Make) -> None:
    with eager(faulty(Fault(Kind.EIO)), SlotPool(1, SLOT)) as transfer:
        ticket = transfer.submit(A, 0, speculative=True)
        until(lambda: ticket.done)
        with pytest.raises(ExpertReadError, match=r"expert 0\.0"):
            transfer.wait(ticket)
        stats = transfer.stats()
    assert (stats.failed, stats.failed_prefetch) == (2, 1)


def test_a_failed_expert_is_not_done_while_another_chunk_of_it_is_still_written(threaded: Make) -> None:
    store = faulty(Fault(Kind.HANG, chunks=[0]), Fault(Kind.EIO, chunks=[1]))
    with threaded(store, SlotPool(1, SLOT), threads=2) as transfer:
        ticket = transfer.submit(A, 0, speculative=False)
        until(lambda: transfer.stats().failed == 1)
        assert not ticket.done
        assert not transfer.cancel(ticket)
        store.release()
        with pytest.raises(ExpertReadError, match="offset 4096"):
            transfer.wait(ticket)
        assert ticket.done
    assert store.injected[Kind.HANG] == 1


def test_a_speculation_promoted_while_it_fails_starts_again_when_its_last_chunk_has_ended(threaded: Make) -> None:
    store, pool = faulty(Fault(Kind.HANG, chunks=[0]), Fault(Kind.EIO, chunks=[1], first=4)), SlotPool(1, SLOT)
    with threaded(store, pool, threads=2) as transfer:
        ticket = transfer.submit(A, 0, speculative=True)
        until(lambda: transfer.stats().failed == 1)
        transfer.promote(ticket)
        store.release()
        transfer.wait(ticket)
    assert pool.view(0) == MemoryStore(SLOT).expert_bytes(A)


def test_a_hanging_read_is_a_time_out_that_names_the_expert_and_keeps_its_slot(threaded: Make) -> None:
    store = faulty(Fault(Kind.HANG, keys=[B]))
    with threaded(store, SlotPool(2, SLOT), threads=1, timeout_s=0.05) as transfer:
        hanging, queued = (transfer.submit(key, slot, speculative=False) for slot, key in enumerate((B, A)))
        for _ in range(2):
            with pytest.raises(TransferError, match=r"memory, offset 0, expert 3\.17: no data for 0\.05 s"):
                transfer.wait(hanging)
        with pytest.raises(TransferError, match=r"memory, offset 0, expert 0\.0: no data for 0\.05 s"):
            transfer.wait(queued)
        assert not hanging.done, "the read may still write to the slot"
        assert queued.done or not transfer.cancel(queued) or queued.done
        store.release()
        until(lambda: hanging.done)


def test_wait_any_gives_back_what_timed_out(threaded: Make) -> None:
    store = faulty(Fault(Kind.HANG))
    with threaded(store, SlotPool(1, SLOT), threads=1, timeout_s=0.05) as transfer:
        ticket = transfer.submit(A, 0, speculative=False)
        assert transfer.wait_any([ticket]) is ticket
        with pytest.raises(TransferError, match="no data"):
            transfer.wait(ticket)
        store.release()


def test_slow_is_not_hanging(threaded: Make) -> None:
    store = faulty(Fault(Kind.SLOW, seconds=0.2), chunks=4)
    with threaded(store, SlotPool(1, SLOT), threads=1, timeout_s=0.6) as transfer:
        transfer.wait(transfer.submit(A, 0, speculative=False))


class Broken(MemoryStore):
    """Raises ``error`` where a store should not."""

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__(SLOT, chunks=2)
        self.broken, self.error = where, error

    def begin(self, key: ExpertKey, into: memoryview) -> MemoryRead:
        if self.broken == "begin":
            raise self.error
        read = super().begin(key, into)
        setattr(read, self.broken, self.fail)
        return read

    def fail(self, *_: object) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("place", "error", "raised", "message"),
    [
        ("begin", CheckpointError("no such layer"), ExpertReadError, "expert 3.17: no such layer"),
        ("begin", FileNotFoundError(2, "gone", "x.safetensors"), ExpertReadError, "x.safetensors"),
        ("read", PackError("bad block"), ExpertReadError, "memory, offset 0, expert 3.17: bad block"),
        ("read", ExpertReadError("truncated"), ExpertReadError, "truncated"),
        ("read", ZeroDivisionError("oops"), TransferError, "expert 3.17: unexpected ZeroDivisionError: oops"),
        ("finish", KeyError("oops"), TransferError, "expert 3.17: unexpected KeyError: 'oops'"),
        ("finish", OSError(5, "late"), ExpertReadError, "expert 3.17: [Errno 5] late"),
    ],
)
def test_whatever_a_store_raises_surfaces_at_the_wait_and_the_workers_live_on(
    of_python: Make, place: str, error: Exception, raised: type[Exception], message: str
) -> None:
    store = Broken(place, error)
    with of_python(store, SlotPool(1, SLOT)) as transfer:
        ticket = transfer.submit(B, 0, speculative=False)
        with pytest.raises(raised, match=re.escape(message)) as got:
            transfer.wait(ticket)
        assert got.value is error or got.value.__cause__ is error
        store.broken = "nothing"
        transfer.wait(transfer.submit(A, 0, speculative=False))
        assert transfer.stats().retries == 0, "only OSErrors of a chunk are retried"


class Verifying(MemoryStore):
    """The first ``finish`` waits for ``gate``, then finds a bad checksum."""

    def __init__(self) -> None:
        super().__init__(SLOT, chunks=2)
        self.verifying, self.gate = threading.Event(), threading.Event()

    def begin(self, key: ExpertKey, into: memoryview) -> MemoryRead:
        read = super().begin(key, into)
        good = read.finish

        def finish() -> None:
            first = not self.verifying.is_set()
            self.verifying.set()
            assert self.gate.wait(PATIENCE_S)
            if first:
                raise ExpertReadError("bad checksum")
            good()

        read.finish = finish  # type: ignore[method-assign]
        return read


@pytest.mark.parametrize("revive", ["no", "before the end", "after the end"])
def test_cancelled_while_a_bad_checksum_is_found(revive: str) -> None:
    store, pool = Verifying(), SlotPool(1, SLOT)
    with ThreadedTransfer(store, pool, threads=2) as transfer:
        ticket = transfer.submit(A, 0, speculative=True)
        assert store.verifying.wait(PATIENCE_S)
        assert not transfer.cancel(ticket), "it is not free while it is verified"
        if revive == "before the end":
            transfer.promote(ticket)
        store.gate.set()
        if revive != "before the end":
            until(lambda: ticket.done)
        if revive == "after the end":
            transfer.promote(ticket)
        if revive != "no":
            transfer.wait(ticket)
            assert pool.view(0) == store.expert_bytes(A)
    assert sum(store.reads.values()) == (2 if revive == "no" else 4)


def test_closing_the_store_ends_a_hang_with_an_error() -> None:
    store = faulty(Fault(Kind.HANG), chunks=1)
    with ThreadedTransfer(store, SlotPool(1, SLOT), threads=1) as transfer:
        ticket = transfer.submit(A, 0, speculative=False)
        until(lambda: store.injected[Kind.HANG] == 1)
        store.close()
        with pytest.raises(ExpertReadError, match="store closed during a hanging read"):
            transfer.wait(ticket)


def strikes(seed: int) -> list[tuple[ExpertKey, int, int]]:
    store = faulty(Fault(Kind.EIO, rate=0.3), seed=seed)
    return [
        (ExpertKey(0, expert), index, attempt)
        for expert in range(20)
        for index in range(4)
        for attempt in range(3)
        if store.strike(ExpertKey(0, expert), index)
    ]


def test_faults_depend_on_the_seed_and_come_at_their_rate() -> None:
    assert strikes(1) == strikes(1) != strikes(2)
    assert 0.2 < len(strikes(1)) / 240 < 0.4


def test_faults_are_restricted_to_their_keys_chunks_and_first_reads() -> None:
    store = faulty(Fault(Kind.SLOW, keys=[A], chunks=[1], first=2))
    hit = [(key, index) for key in (A, B) for index in (0, 1) for _ in range(3) if store.strike(key, index)]
    assert hit == [(A, 1), (A, 1)]
    assert store.injected == {Kind.SLOW: 2}


def test_a_faulty_store_without_faults_is_the_inner_store() -> None:
    store, inner = faulty(chunks=2), MemoryStore(SLOT)
    buffer = memoryview(bytearray(SLOT))
    read: ExpertRead = store.begin(A, buffer)
    for index in range(read.chunks):
        read.read(index)
    read.finish()
    assert buffer == inner.expert_bytes(A)
    assert (store.slot_bytes, store.direct_io, read.disk_bytes) == (SLOT, False, SLOT)
    assert store.layout(0) == inner.layout(0)
