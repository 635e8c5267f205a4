"""The per-layer loop, the prefetcher and the controller, on an in-memory store: no model, no torch, no timing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from time import sleep

import numpy as np
import pytest

from foregate.errors import TransferError
from foregate.experts.cache import ExpertCache, SlotState
from foregate.experts.policy import Lru
from foregate.experts.slots import SlotPool
from foregate.experts.transfer import ThreadedTransfer
from foregate.prefetch.controller import Controller
from foregate.prefetch.pipeline import Pipeline
from foregate.prefetch.prefetcher import Prefetcher, _existing
from foregate.testing.faults import Fault, FaultyStore, Kind
from foregate.testing.stores import MemoryStore
from foregate.types import ExpertKey, Moment, Prediction

AFTER = Moment.AFTER_ROUTING

LAYERS, EXPERTS, TOP_K = 3, 8, 2


class Bench:
    """Pipeline, prefetcher and cache over a store in memory; ``served`` is what was computed, with its bytes."""

    def __init__(self, slots: int, staging: int = 0, limit: int | None = 4, faults: Sequence[Fault] = ()) -> None:
        self.memory = MemoryStore(chunks=2)
        self.store = FaultyStore(self.memory, list(faults))
        self.pool = SlotPool(slots, self.memory.slot_bytes)
        self.cache = ExpertCache(self.pool, Lru(), staging)
        self.transfer = ThreadedTransfer(self.store, self.pool, threads=2, retries=1, timeout_s=5.0)
        self.controller = Controller(limit, expert_bytes=self.memory.slot_bytes, chunk_bytes=4096, layers=LAYERS)
        self.prefetcher = Prefetcher(
            self.cache, self.transfer, self.controller, experts=(EXPERTS,) * LAYERS, top_k=TOP_K
        )
        self.pipeline = Pipeline(self.cache, self.transfer, self.prefetcher)
        self.served: list[int] = []

    def compute(self, layer: int, expert: int, slot: int) -> None:
        assert bytes(self.pool.view(slot)) == self.memory.expert_bytes(ExpertKey(layer, expert))
        self.served.append(expert)

    def decode(self, layer: int, needed: Sequence[int], predictions: Sequence[Prediction] = ()) -> None:
        self.pipeline.decode(
            layer,
            needed,
            lambda e, s: self.compute(layer, e, s),
            lambda: self.prefetcher.consider(layer, AFTER, predictions),
        )
        self.cache.check_integrity(idle=True)

    def stream(self, layer: int, needed: Sequence[int]) -> None:
        self.pipeline.stream(
            layer, needed, lambda e, s: self.compute(layer, e, s), lambda: self.prefetcher.stream_ahead(layer + 1)
        )
        self.cache.check_integrity(idle=True)


@contextmanager
def bench(slots: int, staging: int = 0, limit: int | None = 4, faults: Sequence[Fault] = ()) -> Iterator[Bench]:
    made = Bench(slots, staging, limit, faults)
    try:
        yield made
    finally:
        made.transfer.close()
        made.store.close()


def predicted(layer: int, *experts: int) -> Prediction:
    return Prediction(layer, experts, (1.0,) * len(experts))


@pytest.mark.parametrize("breaks", [False, True])
def test_what_is_predicted_is_read_ahead_while_residents_are_computed(breaks: bool) -> None:
    heard: list[str] = []

    def together(experts: Sequence[int], slots: Sequence[int]) -> Callable[[], float]:
        heard.append(f"begin {list(experts)}")

        def end() -> float:
            heard.append("end")
            return 0.25

        return end

    def meanwhile() -> None:
        heard.append("meanwhile")
        if breaks:
            raise RuntimeError("broken in between")

    def predict() -> Callable[[], None]:
        heard.append("predict")
        return meanwhile

    with bench(slots=4) as b:
        b.decode(0, [1, 2])
        b.served.clear()
        with pytest.raises(RuntimeError, match="broken in between") if breaks else nullcontext():
            b.pipeline.decode(0, [1, 2, 3], lambda e, s: b.compute(0, e, s), predict, together)
        assert heard == ["predict", "begin [1, 2]", "meanwhile"] + ["end"] * (not breaks)
        assert (b.pipeline.stats.compute_s >= 0.25) is not breaks
        assert b.served == ([] if breaks else [3])
        b.cache.check_integrity(idle=True)


def test_every_needed_expert_is_served_once_even_from_a_single_slot() -> None:
    with bench(slots=1) as b:
        b.decode(0, [5, 1, 7])
        assert sorted(b.served) == [1, 5, 7]
        assert b.pipeline.stats.misses == 3
        assert b.pool.peak_slots == 1


def test_residents_are_served_before_what_must_be_read() -> None:
    with bench(slots=4) as b:
        b.decode(0, [3])
        b.served.clear()
        b.decode(0, [6, 3])
        assert b.served == [3, 6]
        assert (b.pipeline.stats.hits, b.pipeline.stats.misses) == (1, 2)


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 24])
def test_streaming_serves_in_ascending_order_from_any_number_of_slots(slots: int) -> None:
    with bench(slots=slots, limit=0) as b:
        b.stream(0, [7, 2, 5, 0, 3])
        b.stream(0, [7, 2, 5, 0, 3])
        assert b.served == [0, 2, 3, 5, 7] * 2
        if slots >= 8:
            assert b.pipeline.stats.misses == 5


def test_streaming_reads_the_next_layer_ahead() -> None:
    with bench(slots=16, staging=8) as b:
        b.stream(0, range(8))
        assert {key.layer for key in b.cache.staged} == {1}
        misses = b.pipeline.stats.misses
        b.stream(1, range(8))
        assert b.prefetcher.stats.used == 8
        assert b.pipeline.stats.misses - misses == b.pipeline.stats.late


def test_only_predicted_and_absent_experts_are_read_ahead() -> None:
    with bench(slots=8, staging=4) as b:
        b.decode(1, [2])
        b.decode(0, [0], [predicted(1, 2, 3)])
        assert list(b.cache.staged) == [ExpertKey(1, 3)]
        b.decode(1, [2, 3])
        assert b.prefetcher.stats.issued == b.prefetcher.stats.used == 1
        assert b.cache.state(ExpertKey(1, 3)) is SlotState.RESIDENT


def test_an_unused_prediction_expires_with_its_layer() -> None:
    with bench(slots=8, staging=4) as b:
        b.decode(0, [0], [predicted(1, 4, 5)])
        b.decode(1, [1])
        b.prefetcher.settle()
        stats = b.prefetcher.stats
        assert (stats.issued, stats.used, stats.wasted + stats.cancelled) == (2, 0, 2)
        assert not b.cache.staged


def test_speculation_never_evicts_a_resident() -> None:
    with bench(slots=4, staging=2) as b:
        b.decode(0, [0])
        b.decode(0, [1])
        residents = set(b.cache.resident)
        b.prefetcher.consider(0, AFTER, [predicted(1, 0, 1, 2, 3)])
        assert set(b.cache.resident) == residents
        assert len(b.cache.staged) == 2
        b.prefetcher.expire()
        b.prefetcher.settle()


def test_garbage_predictions_are_dropped() -> None:
    with bench(slots=8, staging=4) as b:
        b.prefetcher.consider(0, AFTER, [predicted(1, -1, 99, 8), predicted(0, 1), predicted(-1, 1), predicted(9, 1)])
        assert b.prefetcher.stats.issued == 0


def test_layers_beyond_the_last_are_the_next_tokens() -> None:
    with bench(slots=8, staging=4) as b:
        b.prefetcher.consider(2, AFTER, [predicted(LAYERS, 5)])
        assert set(b.cache.staged) == {ExpertKey(0, 5)}
        b.decode(0, [5])
        assert b.pipeline.stats.misses - b.pipeline.stats.late == 0


def test_a_layer_may_be_predicted_until_it_is_routed() -> None:
    with bench(slots=8, staging=4) as b:
        b.prefetcher.consider(1, Moment.BEFORE_ATTENTION, [predicted(0, 4), predicted(1, 5)])
        assert set(b.cache.staged) == {ExpertKey(1, 5)}


def test_a_late_prefetch_is_waited_for_and_read_once() -> None:
    slow = Fault(Kind.SLOW, keys=[ExpertKey(1, 3)], seconds=0.02)
    with bench(slots=8, staging=4, faults=[slow]) as b:
        b.decode(0, [0], [predicted(1, 3)])
        b.decode(1, [3])
        assert b.pipeline.stats.late == 1
        assert [b.memory.reads[ExpertKey(1, 3), chunk] for chunk in (0, 1)] == [1, 1]


def test_a_failed_prefetch_that_is_needed_is_read_on_demand() -> None:
    # Two attempts are the speculative read's own (retries=1); the third, on demand, succeeds.
    failing = Fault(Kind.EIO, keys=[ExpertKey(1, 3)], chunks=[0], first=2)
    with bench(slots=8, staging=4, faults=[failing]) as b:
        b.decode(0, [0], [predicted(1, 3)])
        while b.transfer.stats().failed_prefetch == 0:
            sleep(1e-3)
        b.decode(1, [3])
        assert b.served[-1] == 3


def test_an_error_leaves_cache_and_pool_consistent() -> None:
    broken = Fault(Kind.EIO, keys=[ExpertKey(0, 2)])
    with bench(slots=4, faults=[broken]) as b:
        with pytest.raises(TransferError, match=r"expert 0\.2"):
            b.decode(0, [1, 2, 3])
        b.cache.check_integrity(idle=True)


def test_windows_are_measured_without_the_waits_in_them() -> None:
    with bench(slots=8) as b:
        b.cache.set_staging(2)
        b.prefetcher.arrived(0)
        b.prefetcher.consider(0, Moment.AFTER_ROUTING, [Prediction(1, (1, 2), ())])
        b.prefetcher.saw_wait(100.0)
        b.prefetcher.arrived(1)
        assert b.controller.account().accounts[1].window_s < -90  # nobody waited: the clock was turned back


def test_a_prompt_keeps_what_it_used_most_not_what_it_read_last() -> None:
    with bench(slots=12) as b:
        for layer in range(LAYERS):
            b.pipeline.stream(layer, range(8), lambda e, s: None, lambda: None, keep={1, 6})
        kept = {(layer, expert) for layer in range(LAYERS) for expert in (1, 6)}
        assert kept <= {tuple(key) for key in b.cache.resident}
        b.pipeline.stats.hits = 0
        b.stream(0, range(8))
        assert b.pipeline.stats.hits >= 2


def test_what_was_read_ahead_in_vain_is_given_up_before_the_layer_runs() -> None:
    with bench(slots=20) as b:
        b.cache.set_staging(8)
        b.prefetcher.stream_ahead(1)
        seen: list[int] = []
        b.pipeline.stream(1, [2, 5], lambda e, s: seen.append(b.prefetcher.pending), lambda: None)
        assert seen == [0, 0]
        b.cache.check_integrity(idle=True)


def test_the_next_layer_is_queued_before_the_first_expert_of_this_one_runs() -> None:
    with bench(slots=20) as b:
        b.cache.set_staging(8)
        queued: list[bool] = []
        b.pipeline.stream(
            0,
            range(8),
            lambda e, s: queued.append(all(b.cache.state(ExpertKey(1, x)) is not None for x in range(8))),
            lambda: b.prefetcher.stream_ahead(1),
        )
        assert all(queued)


@pytest.mark.parametrize("named", [(3, 1, 2, 5, 0), (3, 99, 1, -1, 2, 5, 0), (np.int64(3), 1, "2", True, 2), [4, 4, 1]])
def test_what_is_no_expert_is_passed_over_whatever_it_is_named_in(named: Sequence[int]) -> None:
    real = [int(e) for e in named if isinstance(e, (int, np.integer)) and 0 <= e < EXPERTS]
    for most in (1, 3, 9):
        assert _existing(named, EXPERTS, most) == real[:most]
    assert _existing(iter(named), EXPERTS, 2) == real[:2]
