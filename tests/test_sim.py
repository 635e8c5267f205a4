"""The simulator: the engine's own objects on a virtual clock, held against hand arithmetic and plain replay."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from foregate.analysis.belady import Belady
from foregate.analysis.prompt import Shape
from foregate.analysis.replay import Keys, Replay
from foregate.analysis.worths import Worths
from foregate.errors import ConfigError
from foregate.experts.echo import Echo
from foregate.experts.policy import POLICIES
from foregate.sim.device import Device
from foregate.sim.link import SimTransfer, VirtualClock
from foregate.sim.replay import SIM_POLICIES, Forecast, Plan, SimResult, Simulation, decode_events
from foregate.types import ExpertKey, Moment

SHAPE = Shape((12,) * 4, (3,) * 4)
DEVICE = Device(bandwidth=10.0, expert_bytes=40, attention_s=1.0, experts_s=6.0, chunk_bytes=10)
"""An expert takes 4 s in four chunks of 1 s."""


def routes(tokens: int = 60, seed: int = 0) -> NDArray[np.int32]:
    """Skewed choices [T, L, k] without repeats in a row."""
    rng = np.random.default_rng(seed)
    noise = rng.gumbel(size=(tokens, 4, 12)) - 0.4 * np.arange(12)
    return np.argsort(-noise, axis=2)[:, :, :3].astype(np.int32)


def whole(first: NDArray[np.int32]) -> NDArray[np.int16]:
    """Rankings [T, L, E] that begin with ``first``."""
    score = np.zeros((*first.shape[:2], 12))
    np.put_along_axis(score, first.astype(int), np.arange(first.shape[2], 0, -1.0)[None, None], axis=2)
    return np.argsort(-score, axis=2, kind="stable").astype(np.int16)


def run(
    policy: str, slots: int, forecasts: list[list[Forecast]], prompts: list[NDArray[np.int32]], **more: object
) -> SimResult:
    keys = Keys(SHAPE)
    future = [event for prompt in prompts for event in decode_events(keys, prompt)]
    device = Device(**more) if more else DEVICE  # type: ignore[arg-type]
    simulation = Simulation(SHAPE, device, Plan(policy, slots, 3), keys, future)
    for prompt, given in zip(prompts, forecasts, strict=True):
        simulation.prompt(prompt, given)
    return simulation.result()


def test_a_demand_read_that_waits_for_all_speculation() -> None:
    clock = VirtualClock()
    link = SimTransfer(DEVICE, clock)
    ahead = [link.submit(ExpertKey(1, n), n, speculative=True) for n in range(3)]
    clock.now = 1.5  # in the second chunk of the first speculative read
    demand = link.submit(ExpertKey(0, 9), 9, speculative=False)
    link.wait(demand)
    assert clock.now == pytest.approx(2 + 4)
    assert link.stall_s == pytest.approx(4.5)
    link.wait_any([ahead[0]])
    assert clock.now == pytest.approx(6 + 2)


def test_a_cancelled_read_that_still_takes_the_link_and_a_slot_freed_too_early() -> None:
    clock = VirtualClock()
    link = SimTransfer(DEVICE, clock)
    running, queued = (link.submit(ExpertKey(1, n), n, speculative=True) for n in range(2))
    clock.now = 0.5
    assert link.cancel(queued)
    assert not link.cancel(running)
    assert not running.done
    clock.now = 1.0
    assert running.done
    assert not running.ok
    link.rest()
    assert link.busy_s == pytest.approx(1.0)


def test_a_promoted_read_that_begins_again() -> None:
    clock = VirtualClock()
    link = SimTransfer(DEVICE, clock)
    ahead = link.submit(ExpertKey(1, 0), 0, speculative=True)
    clock.now = 3.0
    link.promote(ahead)
    link.wait(ahead)
    assert (clock.now, link.busy_s) == (pytest.approx(4.0), pytest.approx(4.0))


@pytest.mark.parametrize("policy", SIM_POLICIES)
def test_hits_that_differ_from_a_plain_replay(policy: str) -> None:
    """Without predictions the simulator is a replay: same policy objects, same hits; each miss is read once."""
    prompts = [routes(), routes(40, 1)]
    keys = Keys(SHAPE)
    events = [event for prompt in prompts for event in decode_events(keys, prompt)]
    plain = Replay(Belady(events) if policy == "belady" else POLICIES.load(policy)(), 14)
    for event in events:
        plain.run(event)
    found = run(policy, 14, [[], []], prompts)
    assert (found.hits, found.misses) == (plain.hits, plain.misses)
    assert found.issued == found.used == found.wasted == 0
    assert found.busy_s == pytest.approx(4.0 * found.misses)
    assert found.total_s == pytest.approx(7.0 * len(events) + found.stall_s)


def test_echo_that_is_not_told_the_routing() -> None:
    """Told what the routers scored, the simulator has the hits of a replay that is told as the engine is."""
    prompts = [routes(), routes(40, 1)]
    scores = [
        np.random.default_rng(seed).normal(size=(*p.shape[:2], 12)).astype(np.float16) for seed, p in enumerate(prompts)
    ]
    keys, known, rule = Keys(SHAPE), Worths(), Echo()
    simulation = Simulation(SHAPE, DEVICE, Plan("echo", 14, 3), keys, [])
    plain = Replay(rule, 14)
    for experts, logits in zip(prompts, scores, strict=True):
        worths = [[known.of(n, experts[t, n, None], logits[t, n, None]) for n in range(4)] for t in range(len(experts))]
        simulation.prompt(experts, [], np.array(worths))
        for number, event in enumerate(decode_events(keys, experts)):
            token, layer = divmod(number, 4)
            rule.observe(
                layer, experts[token, layer, None].astype(np.int64), logits[token, layer, None].astype(np.float32)
            )
            plain.run(event)
    assert known.scored
    assert simulation.result().hits == plain.hits
    untold = run("echo", 14, [[], []], prompts)
    assert untold.hits != plain.hits, "else the test sees nothing"


@pytest.mark.parametrize("policy", SIM_POLICIES)
def test_an_oracle_that_waits_on_an_infinite_link(policy: str) -> None:
    prompt = routes()
    oracle = Forecast(Moment.AFTER_ROUTING, {1: whole(prompt)})
    found = run(policy, 24, [[oracle]], [prompt], bandwidth=1e12, expert_bytes=40, attention_s=1.0, experts_s=6.0)
    assert found.late == 0
    assert found.stall_s < 1e-6
    # Layer 0 of the first token comes before every prediction.
    assert found.absent - found.used <= 3


def test_a_good_prediction_that_is_worth_less_than_a_bad_one() -> None:
    prompt = routes()
    random = np.random.default_rng(3).permuted(np.broadcast_to(np.arange(12, dtype=np.int16), (60, 4, 12)), axis=2)
    none = run("lru", 16, [[]], [prompt])
    bad = run("lru", 16, [[Forecast(Moment.AFTER_ROUTING, {1: random})]], [prompt])
    good = run("lru", 16, [[Forecast(Moment.AFTER_ROUTING, {1: whole(prompt)})]], [prompt])
    assert good.stall_s < min(bad.stall_s, none.stall_s)
    assert good.recall_on_misses() > 0.95 > bad.recall_on_misses()
    assert bad.wasted_s > good.wasted_s


@pytest.mark.parametrize("leads", [(1,), (2,), (1, 2), (1, 2, 3)])
def test_more_bytes_for_methods_that_speak_twice(leads: tuple[int, ...]) -> None:
    """Two layers ahead, then corrected one layer ahead: together no more reads a layer than one prediction gets."""
    prompt = routes()
    rng = np.random.default_rng(1)
    ranks = {n: rng.permuted(np.broadcast_to(np.arange(12, dtype=np.int16), (60, 4, 12)), axis=2) for n in leads}
    found = run("lru", 16, [[Forecast(Moment.AFTER_ROUTING, ranks)]], [prompt])
    assert 0 < found.issued <= 3 * 60 * 4
    assert found.issued == found.used + found.wasted + found.cancelled


def test_a_cache_below_one_layer() -> None:
    with pytest.raises(ConfigError, match="2 experts: one layer chooses 3"):
        run("lru", 2, [[]], [routes()])


@pytest.mark.parametrize("field", ["bandwidth", "expert_bytes", "attention_s"])
def test_a_device_that_cannot_be(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Device(**{field: -1})  # type: ignore[arg-type]
