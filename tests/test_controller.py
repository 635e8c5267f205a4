"""The controller: what each speculative read is worth, and whether speculation pays at all. No model, no timing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from foregate.prefetch.average import Average
from foregate.prefetch.controller import CONTROL_EVERY, PROBE_EVERY, Controller
from foregate.prefetch.precision import Guess

LAYERS = 3


def controller(limit: int | None = None, off_reason: str = "") -> Controller:
    return Controller(limit, expert_bytes=8 * 2**20, chunk_bytes=2**20, layers=LAYERS, off_reason=off_reason)


def test_a_fixed_limit_is_taken_as_it_is() -> None:
    assert controller(3).allowance(2) == 3
    assert controller(0).allowance(2) == 0


def judged(used: int, wasted: int) -> Controller:
    """After steps of ten reads of 8 ms each, in windows of 10 ms, as many of which were used."""
    c = controller()
    outcomes = [True] * used + [False] * wasted
    for step in range(0, len(outcomes), 10):
        c.begin_step()
        c.link.saw_io(8 * 2**20, 0.008)
        c.saw_misses(1, 0.008)
        here = outcomes[step : step + 10]
        c.saw_step(10, 0.008 * (1 + here.count(False)) if c.speculating else 0.080, 10 * 8 * 2**20)
        c.saw_prediction(0.0001)
        c.saw_window(1, 1, 0.010)
        for outcome in outcomes[step : step + 10]:
            c.judge(Guess(1, 1, 0), used=outcome)
    return c


def test_speculation_that_pays_stays_on() -> None:
    c = judged(used=100, wasted=0)
    c.begin_step()
    assert c.decision.enabled
    assert "pays: saves" in c.decision.reason
    assert c.allowance(4) == 4


def test_where_the_link_never_rests_reads_that_are_used_save_nothing() -> None:
    c = controller()
    for _ in range(20):
        c.begin_step()
        c.link.saw_io(10 * 8 * 2**20, 0.080)
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
    """1.5 ms of three reads, which is all that it loses, of 2 ms saved."""
    c = controller()
    for _ in range(20):
        c.begin_step()
        c.link.saw_io(4 * 8 * 2**20, 0.032)
        c.saw_misses(1, 0.008)
        c.saw_step(4, 0.030 if c.speculating else 0.032, 3 * 8 * 2**20)
        for outcome in [True, True, True, False, False, False]:
            c.judge(Guess(1, 1, 0), used=outcome)
    assert c.decision.enabled
    assert c.decision.loss_s == pytest.approx(0.0015, rel=0.01)


def test_what_is_not_waited_for_without_speculation_is_not_its_merit() -> None:
    for without in (0.032, 0.0022):
        c = controller()
        for _ in range(2 * CONTROL_EVERY):
            c.begin_step()
            c.link.saw_io(4 * 8 * 2**20, 0.032)
            c.saw_misses(1, 0.008)
            c.saw_step(4, 0.002 if c.speculating else without, 4 * 8 * 2**20)
            for outcome in [True, True, True, False]:
                c.judge(Guess(1, 1, 0), used=outcome)
        assert c.decision.enabled is (without == 0.032)


def test_two_chance_steps_without_speculation_do_not_end_it_and_enough_of_them_do() -> None:
    """Without it the model waits 10 ms on average, with it 16: after two steps that is chance if they were 0 and 20."""
    for alone, enabled in (([0.0, 0.020], True), ([0.010, 0.010], False)):
        c = controller()
        for step in range(20):
            c.begin_step()
            c.link.saw_layer(0.012)
            c.link.saw_io(4 * 8 * 2**20, 0.032)
            c.saw_misses(1, 0.008)
            c.saw_step(4, 0.016 if c.speculating else alone[step % 2], 4 * 8 * 2**20)
            for outcome in [True, True, True, False]:
                c.judge(Guess(1, 1, 0), used=outcome)
        assert c.decision.enabled is enabled


def test_a_read_is_worth_what_its_window_has_room_for() -> None:
    c = judged(used=60, wasted=0)
    first, second, third = (c.value(Guess(1, 1, 0), queued) for queued in (0, 1, 2))
    assert first > second > 0 >= third  # 8 ms fit the window of 10 ms, then 2 ms are left, then nothing
    assert judged(used=20, wasted=60).value(Guess(1, 1, 0), 0) < first


def test_no_more_than_a_few_best_guesses_are_explored_at_once() -> None:
    c = controller()
    c.begin_step()
    c.link.saw_io(8 * 2**20, 0.008)
    guesses = [Guess(n % LAYERS, 1 + n, 0) for n in range(6)]
    assert [one.precision for one in c.odds(guesses)] == [1.0] * 4 + [pytest.approx(0.7)] * 2
    for guess in guesses[:3]:
        c.issued(guess)
    assert [one.precision for one in c.odds(guesses)][:2] == [1.0, pytest.approx(0.7)]


def test_better_ranks_are_expected_to_be_used_more_until_reads_tell() -> None:
    c = Controller(None, expert_bytes=8 * 2**20, chunk_bytes=2**20, layers=LAYERS, top_k=4)
    c.begin_step()
    c.link.saw_io(8 * 2**20, 0.008)
    guesses = [Guess(1, 1, rank) for rank in range(6)]
    for guess in [*guesses[:3], guesses[0]]:
        c.issued(guess)
    first = [one.precision for one in c.odds(guesses)]
    assert first[:4] == sorted(first[:4], reverse=True)
    assert first[3] > first[4] == first[5]
    for _ in range(40):
        for rank, guess in enumerate(guesses):
            c.judge(guess, used=rank == 5)
    told = [one.precision for one in c.odds(guesses)]
    assert told[5] > 0.8 > 0.1 > max(told[:5])


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
    assert sum(value > 0 for value in allowed) == 2  # 16 and 48 steps after it was switched off
    assert c.switches == 1


def on_a_slow_link(alone_s: Sequence[float], with_s: Sequence[float], steps: int) -> Controller:
    """An expert takes 16 ms, each of 16 layers 2: steps need four and wait as long as the sequences say, in turn."""
    c = Controller(None, expert_bytes=8 * 2**20, chunk_bytes=2**20, readers=8, layers=16)
    c.link.saw_prompt(100 * 8 * 2**20, 1.6, 1.0, 1.6)
    for step in range(steps):
        c.begin_step()
        c.link.saw_layer(0.002)
        c.link.saw_io(4 * 8 * 2**20, 0.064)
        waits = with_s if c.speculating else alone_s
        c.saw_step(4, waits[step % len(waits)], 4 * 8 * 2**20 if c.speculating else 0)
        if c.speculating:
            for outcome in [True, True, True, False]:
                c.judge(Guess(1, 1, 0), used=outcome)
    assert not c.link.busy
    return c


def first_steps(needed: int, stall_s: float, *, prompt_s: float) -> Controller:
    """Three of them: a layer takes 8 ms, the prompt says ``prompt_s`` for an expert, reads themselves 8 ms."""
    c = Controller(None, expert_bytes=8 * 2**20, chunk_bytes=2**20, readers=8, layers=LAYERS)
    c.link.saw_prompt(100 * 8 * 2**20, 100 * prompt_s, 50 * prompt_s, 100 * prompt_s)
    for _ in range(3):
        c.begin_step()
        c.link.saw_layer(0.008)
        c.link.saw_io(needed * 8 * 2**20, needed * 0.008)
        c.saw_step(needed, stall_s, 0)
    return c


def test_on_a_busy_link_speculation_is_off_at_first() -> None:
    """Of a step's time the link is needed for all, or for two thirds."""
    busy, resting = (first_steps(20, 0.008 * (needed - LAYERS), prompt_s=0.008) for needed in (20, 30))
    assert (busy.speculating, busy.decision.reason) == (False, "busy link: tried now and then")
    assert (resting.speculating, resting.decision.reason) == (True, "warming up")


def test_a_tight_link_is_busy_sooner() -> None:
    """One that takes two layers' time for an expert, or one and a half, and is needed for 83 % of a step."""
    for expert_s, tight in ((0.012, False), (0.018, True)):
        c = first_steps(10, 10 * expert_s / 0.83 - 0.008 * LAYERS, prompt_s=expert_s)
        assert (c.link.tight, c.speculating) == (tight, not tight)


@pytest.mark.parametrize(("prompt_s", "slow"), [(0.024, False), (0.032, True)])
def test_on_a_link_that_takes_many_layers_time_for_an_expert_too_though_steps_need_it_little(
    prompt_s: float, slow: bool
) -> None:
    """Three or four layers' time, and needed for two experts in 88 ms."""
    c = first_steps(2, 0.064, prompt_s=prompt_s)
    assert not c.link.busy
    assert (c.speculating, c.decision.reason) == (not slow, "slow link: tried now and then" if slow else "warming up")
    assert c.costs().crowding == (1.0 if slow else 0.2)


def try_once(
    c: Controller, step: int, alone_s: Sequence[float], with_s: Sequence[float], layer_s: float = 0.016
) -> None:
    """An expert takes 16 ms, the step needs four and waits as the sequences say, in turn."""
    c.begin_step()
    c.link.saw_layer(layer_s)
    c.link.saw_io(4 * 8 * 2**20, 0.064)
    waits = with_s if c.speculating else alone_s
    c.saw_step(4, waits[step % len(waits)], 4 * 8 * 2**20)
    if c.speculating:
        for outcome in [True, True, True, False]:
            c.judge(Guess(1, 1, 0), used=outcome)


def tried(alone_s: Sequence[float], with_s: Sequence[float], steps: int, layer_s: float = 0.016) -> Controller:
    c = Controller(None, expert_bytes=8 * 2**20, chunk_bytes=2**20, readers=8, layers=LAYERS)
    for step in range(steps):
        try_once(c, step, alone_s, with_s, layer_s)
    return c


@pytest.mark.parametrize(
    ("wait_s", "layer_s", "busy", "enough_s"),
    [(0.016, 0.016, True, 0.010), (0.070, 0.0075, False, 0.005), (0.040, 0.016, False, 0.003)],
    ids=["busy", "tight", "fast"],
)
def test_how_sure_it_must_be_that_speculation_pays_depends_on_the_link(
    wait_s: float, layer_s: float, busy: bool, enough_s: float
) -> None:
    """Of steps of 64 ms, 93 or 88 the link is needed for 64; speculation costs 2, and a standard error is 2 to 3."""
    sure = tried([wait_s], [wait_s - 0.004], 120, layer_s)
    assert sure.decision.enabled
    assert "pays: saves" in sure.decision.reason
    assert sure.costs().crowding == (1.0 if busy else 0.2)
    for saved_s in (-0.006, 0.003, 0.005, 0.010):
        in_doubt = tried([wait_s - 0.012, wait_s + 0.012], [wait_s - saved_s], 120, layer_s)
        assert in_doubt.decision.enabled is (saved_s >= enough_s)


def test_what_is_read_ahead_costs_its_processor_time_used_or_not() -> None:
    """2 ms of four reads, of which one is in vain."""
    for saved_s, pays in ((0.0015, False), (0.0025, True)):
        c = tried([0.040], [0.040 - saved_s], 120)
        assert (c.decision.enabled, c.decision.loss_s) == (pays, pytest.approx(0.002, rel=0.01))


def test_a_prompt_that_waited_for_something_else_says_nothing_of_the_link() -> None:
    """32 ms an expert would be four layers: slow. But then no step could have read 20 in the time of 30."""
    assert not first_steps(2, 0.064, prompt_s=0.032).speculating
    c = first_steps(20, 0.008 * (30 - LAYERS), prompt_s=0.032)
    assert c.speculating
    assert c.decision.reason == "warming up"


def test_on_a_slow_link_speculation_is_off_until_it_has_paid_beyond_chance() -> None:
    early = on_a_slow_link([0.064], [0.030], 10)
    assert (early.decision.enabled, early.decision.reason) == (False, "slow link: tried now and then")
    assert on_a_slow_link([0.064, 0.066], [0.030, 0.032], 120).decision.enabled
    # A mean of 60 ms against 54, but of waits of 30 and 90: that may be chance.
    assert not on_a_slow_link([0.030, 0.090], [0.054], 120).decision.enabled
    assert on_a_slow_link([0.060], [0.054], 120).decision.enabled


def test_a_link_that_gives_more_after_a_rest_is_taken_for_what_it_gives_in_the_long_run() -> None:
    c = on_a_slow_link([0.064], [0.064], 10)
    c.link.saw_io(8 * 2**20, 0.001)
    c.saw_window(1, 1, 0.002)
    # 2 ms may be saved, and 14 of 16 lost.
    bound = c.value(Guess(1, 1, 1), 0)
    assert bound < 0
    for nothing in ((0, 0.0, 0.0, 0.1), (10 * 8 * 2**20, 0.01, 0.01, 0.01), (100 * 8 * 2**20, 0.8, 0.5, 1.7)):
        c.link.saw_prompt(*nothing)
        assert c.value(Guess(1, 1, 1), 0) == bound
    c.link.saw_prompt(100 * 8 * 2**20, 0.8, 0.1, 1.2)  # faster, and computing was the bound
    assert c.value(Guess(1, 1, 1), 0) > bound


def test_a_prompt_that_computing_was_the_bound_of_says_nothing_of_the_link_though_reads_ran_all_the_time() -> None:
    c, waited = controller(), controller()
    c.link.saw_prompt(100 * 8 * 2**20, 1.6, 0.2, 1.6)
    waited.link.saw_prompt(100 * 8 * 2**20, 1.6, 0.6, 1.6)
    for one in (c, waited):
        for _ in range(4):
            one.begin_step()
            one.link.saw_layer(0.002)
            one.link.saw_io(4 * 8 * 2**20, 0.008)
            one.saw_step(4, 0.060, 0)
        one.begin_step()
    assert c.decision.reason == "warming up"
    assert waited.decision.reason == "slow link: tried now and then"


def test_probes_try_best_guesses_that_have_become_better() -> None:
    c = Controller(None, expert_bytes=8 * 2**20, chunk_bytes=2**20, readers=8, layers=LAYERS)
    best, reads = Guess(1, 1, 0), []
    for step in range(400):
        c.begin_step()
        c.link.saw_io(4 * 8 * 2**20, 0.032)
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
        c.link.saw_io(8 * 2**20, 0.016)
        c.saw_window(1, 1, 0.004)
        for outcome in [True, True, True, False] * 3:
            c.judge(Guess(1, 1, 0), used=outcome)
    assert one.value(Guess(1, 1, 0), 0) > 0 > eight.value(Guess(1, 1, 0), 0)


def test_means_are_plain_at_first_and_forget_later() -> None:
    mean = Average(0.25)
    for value in (1.0, 3.0):
        mean.add(value)
    assert mean.get() == 2.0
    for _ in range(100):
        mean.add(7.0)
    assert mean.get() == pytest.approx(7.0)


def test_a_reason_known_beforehand_is_final() -> None:
    c = controller(None, off_reason="no staging")
    c.begin_step()
    assert (c.allowance(4), c.decision.reason) == (0, "no staging")


def test_slots_are_set_aside_for_what_the_link_can_bring_in_time() -> None:
    c = controller()
    assert c.staging(2, 8) == 8  # nothing is known yet
    c.link.saw_io(8 * 2**20, 0.004)
    assert c.staging(2, 8) == 8
    c.link.saw_layer(0.005)
    assert [c.staging(reach, 8) for reach in (1, 2, 6)] == [3, 4, 8]
    assert c.staging(2, 3) == 3
    for _ in range(200):
        c.link.saw_io(8 * 2**20, 0.050)  # a slow link: less than a read in two layers
    assert c.staging(2, 8) == 2
    c = controller()
    c.link.saw_io(8 * 2**20, 0.005)
    c.link.saw_layer(0.00495)
    assert c.staging(2, 8) == 3
    for _ in range(200):  # a little more than two reads now: no reason to evict
        c.link.saw_layer(0.00505)
    assert c.staging(2, 8) == 3
    for _ in range(200):
        c.link.saw_layer(0.006)
    assert c.staging(2, 8) == 4
    fixed = controller(4)
    fixed.link.saw_io(8 * 2**20, 0.050)
    fixed.link.saw_layer(0.005)
    assert fixed.staging(2, 8) == 8


def test_a_slow_link_is_probed_with_few_reads() -> None:
    c = Controller(None, expert_bytes=8 * 2**20, chunk_bytes=2**20, readers=8, layers=LAYERS)
    c.begin_step()
    c.link.saw_io(8 * 2**20, 0.050)
    c.link.saw_layer(0.005)
    while not c.speculating:
        c.begin_step()
    assert not c.decision.enabled
    reads = 0
    while c.allowance(8) and c.value(Guess(0, 1, 0), 0) > 0:
        c.issued(Guess(0, 1, 0))
        reads += 1
    assert reads == 4
    assert c.value(Guess(0, 1, 0), 0) == 0
    while c.speculating:
        c.begin_step()
    assert c.allowance(8) == 0


def test_a_slow_link_is_probed_as_often_until_there_is_something_to_judge_it_by() -> None:
    c = on_a_slow_link([0.064], [0.064], 1)
    probes = []
    for step in range(2, 2 * CONTROL_EVERY + 2):
        c.begin_step()
        c.saw_step(4, 0.064, 0)
        if c.speculating:
            probes.append(step)
    between = [later - earlier for earlier, later in pairwise(probes)]
    assert between == [PROBE_EVERY + 1] * 3 + [2 * PROBE_EVERY + 1]


def test_so_is_a_busy_one() -> None:
    alone, ahead = [0.010, 0.022], [0.014]
    c = tried(alone, ahead, 5)
    assert (c.decision.enabled, c.link.busy) == (False, True)
    probes = []
    for step in range(6, 2 * CONTROL_EVERY):
        try_once(c, step, alone, ahead)
        if c.speculating:
            probes.append(step)
            for _ in range(4):
                assert c.allowance(6) == 6
                c.issued(Guess(1, 1, 0))
            assert c.allowance(6) == 0
    assert [later - earlier for earlier, later in pairwise(probes)] == [PROBE_EVERY + 1] * 3 + [2 * PROBE_EVERY + 1]


@pytest.mark.parametrize(("steps", "verdict"), [(6, "warming up"), (22, "pay")])
def test_a_verdict_on_a_busy_link_stands_when_it_rests_again(steps: int, verdict: str) -> None:
    """Without one there is more to be tried."""
    c = tried([0.016], [0.020], steps)
    assert (c.decision.enabled, c.link.busy) == (False, True)
    for step in range(20):
        try_once(c, step, [0.200], [0.196])
        if not c.link.busy:
            break
    c.begin_step()
    assert not c.link.busy
    assert verdict in c.decision.reason


def test_hits_that_a_prompt_loses_are_no_steps() -> None:
    c = judged(used=50, wasted=0)
    for _ in range(60):
        c.begin_step()
        c.judge(Guess(1, 1, 0), used=True)
        c.saw_step(1, 0.0, 0)
        for _ in range(5):
            c.saw_ghost()
    c.begin_step()
    assert "0.0 hits lost" in c.decision.reason
