"""The per-layer loop, the prefetcher and the controller, on an in-memory store: no model, no torch, no timing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from time import sleep

import numpy as np
import pytest

from foregate.errors import TransferError
from foregate.experts.cache import ExpertCache, SlotState
from foregate.experts.policy import Lru
from foregate.experts.slots import SlotPool
from foregate.experts.transfer import ThreadedTransfer
from foregate.prefetch.average import Spread
from foregate.prefetch.controller import CONTROL_EVERY, PROBE_EVERY, Controller, Guess
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


# Controller


def controller(limit: int | None = None, **settings: str) -> Controller:
    return Controller(limit, expert_bytes=8 * 2**20, chunk_bytes=2**20, layers=LAYERS, **settings)


def test_a_fixed_limit_is_taken_as_it_is() -> None:
    assert controller(3).allowance(2) == 3
    assert controller(0).allowance(2) == 0


def judged(used: int, wasted: int) -> Controller:
    """After steps of ten reads of 8 ms each, in windows of 10 ms, as many of which were used."""
    c = controller()
    outcomes = [True] * used + [False] * wasted
    for step in range(0, len(outcomes), 10):
        c.begin_step()
        c.saw_io(8 * 2**20, 0.008)
        c.saw_misses(1, 0.008)
        here = outcomes[step : step + 10]
        c.saw_step(10, 0.008 * (1 + here.count(False)) if c.speculating else 0.080, 10 * 8 * 2**20)
        c.saw_prediction(0.0001)
        c.saw_window(1, 1, 0.010)
        for outcome in outcomes[step : step + 10]:
            c.judge(Guess(1, 1, 0), used=outcome)
    return c


def test_speculation_that_pays_stays_on() -> None:
    c = judged(used=50, wasted=0)
    c.begin_step()
    assert c.decision.enabled
    assert "pays: saves" in c.decision.reason
    assert c.allowance(4) == 4


def test_where_the_link_never_rests_reads_that_are_used_save_nothing() -> None:
    c = controller()
    for _ in range(20):
        c.begin_step()
        c.saw_io(10 * 8 * 2**20, 0.080)
        c.saw_misses(5, 0.040)
        # Nine reads are needed, one was in vain: computation hides 5 ms, and the waste has taken 8.
        c.saw_step(9, 0.075 if c.speculating else 0.072, 5 * 8 * 2**20)
        c.saw_prediction(0.0001)
        for outcome in [True, True, True, True, False]:
            c.judge(Guess(1, 1, 0), used=outcome)
    c.begin_step()
    assert not c.decision.enabled
    assert "does not pay" in c.decision.reason


def test_a_read_that_is_cancelled_before_it_began_costs_nothing() -> None:
    c = controller()
    for _ in range(20):
        c.begin_step()
        c.saw_io(4 * 8 * 2**20, 0.032)
        c.saw_misses(1, 0.008)
        c.saw_step(4, 0.008 if c.speculating else 0.032, 3 * 8 * 2**20)
        for outcome in [True, True, True, False, False, False]:
            c.judge(Guess(1, 1, 0), used=outcome)
    assert c.decision.enabled


def test_what_is_not_waited_for_without_speculation_is_not_its_merit() -> None:
    for without in (0.032, 0.003):
        c = controller()
        for _ in range(2 * CONTROL_EVERY):
            c.begin_step()
            c.saw_io(4 * 8 * 2**20, 0.032)
            c.saw_misses(1, 0.008)
            c.saw_step(4, 0.002 if c.speculating else without, 4 * 8 * 2**20)
            for outcome in [True, True, True, False]:
                c.judge(Guess(1, 1, 0), used=outcome)
        assert c.decision.enabled is (without == 0.032)


def test_a_read_is_worth_what_its_window_has_room_for() -> None:
    c = judged(used=60, wasted=0)
    first, second, third = (c.value(Guess(1, 1, 0), queued) for queued in (0, 1, 2))
    assert first > second > 0 >= third  # 8 ms fit the window of 10 ms, then 2 ms are left, then nothing
    assert judged(used=20, wasted=60).value(Guess(1, 1, 0), 0) < first


def test_hits_lost_to_the_reserve_count_against_speculation() -> None:
    c = judged(used=50, wasted=0)
    for _ in range(60):
        c.begin_step()
        c.judge(Guess(1, 1, 0), used=True)
        for _ in range(5):
            c.saw_ghost()
    c.begin_step()
    assert not c.decision.enabled
    assert "hits lost" in c.decision.reason


def test_speculation_that_wastes_is_switched_off_but_probed() -> None:
    c = judged(used=0, wasted=200)
    allowed = []
    for _ in range(4 * PROBE_EVERY):
        c.begin_step()
        allowed.append(c.allowance(4))
    assert not c.decision.enabled
    assert "does not pay" in c.decision.reason
    assert sum(value > 0 for value in allowed) == 1  # the one before was among the steps that judged, the next is later
    assert c.switches == 1


def on_a_slow_link(alone_s: Sequence[float], with_s: Sequence[float], steps: int) -> Controller:
    """An expert takes 16 ms, a layer 2: steps need four and wait as long as the sequences say, in turn."""
    c = Controller(None, expert_bytes=8 * 2**20, chunk_bytes=2**20, readers=8, layers=LAYERS)
    c.saw_prompt(100 * 8 * 2**20, 1.6, 1.6)
    for step in range(steps):
        c.begin_step()
        c.saw_layer(0.002)
        c.saw_io(4 * 8 * 2**20, 0.064)
        waits = with_s if c.speculating else alone_s
        c.saw_step(4, waits[step % len(waits)], 3 * 8 * 2**20 if c.speculating else 0)
        if c.speculating:
            for outcome in [True, True, True, False]:
                c.judge(Guess(1, 1, 0), used=outcome)
    return c


def test_on_a_slow_link_speculation_is_off_until_it_has_paid_beyond_chance() -> None:
    early = on_a_slow_link([0.064], [0.030], 10)
    assert (early.decision.enabled, early.decision.reason) == (False, "slow link: tried now and then")
    assert on_a_slow_link([0.064, 0.066], [0.030, 0.032], 120).decision.enabled
    # A mean of 60 ms against 50, but of waits of 10 and 110: that may be chance.
    assert not on_a_slow_link([0.010, 0.110], [0.050], 120).decision.enabled


def test_a_link_that_gives_more_after_a_rest_is_taken_for_what_it_gives_in_the_long_run() -> None:
    c = on_a_slow_link([0.064], [0.064], 10)
    c.saw_io(8 * 2**20, 0.001)
    c.saw_window(1, 1, 0.002)
    # 2 ms may be saved, and 14 of 16 lost.
    bound = c.value(Guess(1, 1, 1), 0)
    assert bound < 0
    for nothing in ((0, 0.0, 0.1), (10 * 8 * 2**20, 0.01, 0.01), (100 * 8 * 2**20, 0.8, 1.7)):
        c.saw_prompt(*nothing)
        assert c.value(Guess(1, 1, 1), 0) == bound
    c.saw_prompt(100 * 8 * 2**20, 0.8, 1.2)  # faster, and computing was the bound
    assert c.value(Guess(1, 1, 1), 0) > bound


def test_probes_try_best_guesses_that_have_become_better() -> None:
    c = Controller(None, expert_bytes=8 * 2**20, chunk_bytes=2**20, readers=8, layers=LAYERS)
    best, reads = Guess(1, 1, 0), []
    for step in range(400):
        c.begin_step()
        c.saw_io(4 * 8 * 2**20, 0.032)
        c.saw_window(1, 1, 0.003)
        here = 0
        while c.speculating and here < 3 and c.value(best, 0) > 0:
            c.issued(best)
            c.judge(best, used=step > 50)
            here += 1
        c.saw_prediction(0.0005)
        c.saw_step(4, 0.032 - 0.003 * here * (step > 50), here * 8 * 2**20)
        reads.append(here)
    assert sum(reads[20:50]) <= 8
    assert min(reads[-10:]) > 0
    assert c.decision.enabled


def test_a_predictor_is_asked_once_before_it_is_believed_again() -> None:
    c = judged(used=0, wasted=200)
    asked = []
    for _ in range(3 * PROBE_EVERY):
        c.begin_step()
        asked.append((c.rehearsing, c.speculating))
    for now, then in pairwise(asked):
        assert now[0] is (then[1] and not now[1])
    assert any(rehearses for rehearses, _ in asked)
    assert not any(c.rehearsing for c in (controller(3), controller(0), controller(None, off_reason="no staging")))


def test_where_nothing_is_read_predictions_are_not_asked_for_ever() -> None:
    c = controller()
    for _ in range(40):
        c.begin_step()
        c.saw_step(0, 0.0, 0)
        c.saw_prediction(0.004)
    assert not c.decision.enabled


def test_what_a_wrong_read_holds_up_counts_against_it() -> None:
    one, eight = (Controller(None, expert_bytes=8 * 2**20, chunk_bytes=2**20, readers=n, layers=LAYERS) for n in (1, 8))
    for c in (one, eight):
        c.begin_step()
        c.saw_io(8 * 2**20, 0.016)
        c.saw_window(1, 1, 0.004)
        for outcome in [True, True, True, False] * 3:
            c.judge(Guess(1, 1, 0), used=outcome)
    assert one.value(Guess(1, 1, 0), 0) > 0 > eight.value(Guess(1, 1, 0), 0)


def test_windows_and_layers_are_measured_without_the_waits_in_them() -> None:
    with bench(slots=8) as b:
        b.cache.set_staging(2)
        b.prefetcher.arrived(0)
        b.prefetcher.consider(0, Moment.AFTER_ROUTING, [Prediction(1, (1, 2), ())])
        b.prefetcher.saw_wait(100.0)
        b.prefetcher.arrived(1)
        assert b.controller.ledger.accounts[1].window_s < -90  # nobody waited: the clock was turned back


def test_means_are_plain_at_first_and_forget_later() -> None:
    mean = Spread(0.25)
    for value in (1.0, 3.0):
        mean.add(value)
    assert mean.get() == 2.0
    assert mean.error == 1.0
    for _ in range(100):
        mean.add(7.0)
    assert mean.get() == pytest.approx(7.0)
    assert mean.error == pytest.approx(0.0, abs=1e-3)


def test_a_reason_known_beforehand_is_final() -> None:
    c = controller(None, off_reason="no staging")
    c.begin_step()
    assert (c.allowance(4), c.decision.reason) == (0, "no staging")


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
