"""Event-atomic replay against a brute-force reference; Belady is the optimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foregate.analysis.belady import Belady
from foregate.analysis.eviction import Pass, _replay, events_of
from foregate.analysis.hitcurve import CAUSAL, HitCurves, prompt_events
from foregate.analysis.misses import MissMask
from foregate.analysis.prompt import Shape
from foregate.analysis.replay import Event, Keys, Replay, split_events
from foregate.analysis.settings import Settings
from foregate.errors import IntegrityError
from foregate.experts.echo import Echo
from foregate.experts.policy import POLICIES, Lru
from foregate.types import ExpertKey
from test_analysis_known import prompt
from test_analysis_traces import Independent

EVENTS = st.lists(
    st.sets(st.integers(0, 7), min_size=1, max_size=3).map(
        lambda s: tuple(ExpertKey(e % 2, e // 2) for e in sorted(s))
    ),
    min_size=1,
    max_size=40,
)


def hits(policy: str, events: list[Event], slots: int) -> int:
    replay = Replay(Belady(events) if policy == "belady" else POLICIES.load(policy)(), slots)
    for event in events:
        replay.run(event)
    return replay.hits


def reference(policy: str, events: list[Event], slots: int) -> int:
    """The definition, with lists: count hits, then make room for each absent key among those not needed."""
    last: dict[ExpertKey, int] = {}
    uses: dict[ExpertKey, int] = {}
    found = clock = 0
    score: dict[str, Callable[[ExpertKey], tuple[float, int]]] = {
        "lru": lambda key: (0, last[key]),
        "lfu": lambda key: (uses[key], last[key]),
        "lfru": lambda key: (uses[key] / (clock - last[key] + 1), last[key]),
    }
    for event in events:
        absent = [key for key in event if key not in last]
        found += len(event) - len(absent)
        for key in [*(key for key in event if key in last), *absent]:
            if key not in last and len(last) >= slots:
                victim = min((old for old in last if old not in event), key=score[policy])
                del last[victim], uses[victim]
            clock += 1
            last[key], uses[key] = clock, uses.get(key, 0) + 1
    return found


def optimum(events: list[Event], slots: int) -> int:
    """Most hits of any schedule, by trying every set that can be kept."""
    best: dict[frozenset[ExpertKey], int] = {frozenset(): 0}
    for event in events:
        after: dict[frozenset[ExpertKey], int] = {}
        for held, score in best.items():
            total = score + len(held & set(event))
            kept = held - set(event)
            room = min(len(kept), slots - len(event))
            for rest in combinations(sorted(kept), room):
                state = frozenset(rest) | set(event)
                after[state] = max(after.get(state, 0), total)
        best = after
    return max(best.values())


@given(EVENTS, st.integers(3, 8), st.sampled_from(("lru", "lfu", "lfru")))
@settings(max_examples=80, deadline=None)
def test_replay_equals_the_reference(events: list[Event], slots: int, policy: str) -> None:
    assert hits(policy, events, slots) == reference(policy, events, slots)


@given(EVENTS, st.integers(3, 8))
@settings(max_examples=80, deadline=None)
def test_no_causal_policy_beats_belady(events: list[Event], slots: int) -> None:
    best = hits("belady", events, slots)
    assert all(hits(policy, events, slots) <= best for policy in CAUSAL)


@given(EVENTS.map(lambda events: events[:12]), st.integers(3, 5))
@settings(max_examples=60, deadline=None)
def test_belady_equals_the_best_of_all_schedules(events: list[Event], slots: int) -> None:
    assert hits("belady", events, slots) == optimum(events, slots)


def test_belady_refuses_a_future_that_it_was_not_told() -> None:
    policy = Belady([(ExpertKey(0, 1),)])
    with pytest.raises(IntegrityError, match="more often than in the events"):
        policy.touch(ExpertKey(0, 2))
    with pytest.raises(IntegrityError, match="none of 0 candidates"):
        policy.victim([])


def test_the_experts_of_one_event_never_push_each_other_out() -> None:
    keys = [ExpertKey(0, n) for n in range(4)]
    replay = Replay(Lru(), 3)
    for event in ((keys[0], keys[1]), (keys[2], keys[3]), (keys[3], keys[2])):
        replay.run(event)
    assert replay.hits == 2


def test_a_prefill_pass_is_one_event_a_layer_and_a_decode_token_another() -> None:
    one = prompt([[[0, 1], [0, 1]], [[1, 2], [3, 0]], [[2, 3], [1, 2]]], [False, False, True])
    events = prompt_events(one, Keys(Shape((4, 4), (2, 2))), decode_only=False)
    assert [[key.expert for key in event] for event in events] == [[0, 1, 2], [0, 1, 3], [2, 3], [1, 2]]
    assert prompt_events(one, Keys(Shape((4, 4), (2, 2))), decode_only=True) == events[2:]
    assert [len(event) for event in split_events(events, 2)] == [2, 1, 2, 1, 2, 2]


def test_misses_are_those_of_the_replay() -> None:
    shape = Shape((8,) * 3, (2,) * 3)
    experts = Independent(layers=3, experts=8).choose(np.random.default_rng(0), "d", 40)
    one = prompt(experts, np.ones(40, bool))
    mask = MissMask(shape, 0.5, limit=10**6)
    events = prompt_events(one, Keys(shape), decode_only=True)
    assert int((~mask.add(one)).sum()) == hits("lru", events, 12)
    assert MissMask(shape, 0.05, limit=10**6).add(one).sum() == 0  # too small for one layer: nothing is claimed


def test_hit_curves_never_fall_for_lru_and_belady_is_on_top() -> None:
    curves = HitCurves(Shape((16,) * 4, (2,) * 4), Settings())
    rng = np.random.default_rng(0)
    for _ in range(5):
        curves.add(prompt(Independent().choose(rng, "d", 30), np.arange(30) > 9))
    found = curves.finish().summary["hit_rate"]
    for arm in ("decode", "prefill and decode"):
        rates = {p: [r["hit_rate"] for r in found if r["arm"] == arm and r["policy"] == p] for p in (*CAUSAL, "belady")}
        assert rates["lru"] == sorted(rates["lru"])
        assert all(np.all(np.array(rates["belady"]) >= rates[policy]) for policy in CAUSAL)


@pytest.mark.parametrize("scored", [True, False])
def test_echo_in_the_hit_curve_knows_what_it_knows_in_the_engine(scored: bool) -> None:
    """The same hits as a policy that is told every decision as it comes, at every residency and in both arms."""
    shape = Shape((16,) * 3, (2,) * 3)
    rng = np.random.default_rng(1)
    prompts = []
    for _ in range(4):
        logits = rng.gumbel(size=(40, 3, 16)) - 0.3 * np.arange(16)
        chosen = np.argsort(-logits, axis=2)[:, :, :2].astype(np.int32)
        scores = logits.astype(np.float16) if scored else None
        prompts.append(replace(prompt(chosen, np.arange(40) > 9), scores=scores))
    curves = HitCurves(shape, Settings())
    for one in prompts:
        curves.add(one)
    section = curves.finish()
    passes = [
        [Pass(one.experts[rows].astype(np.int64), None if one.scores is None else one.scores[rows].astype(np.float32))
         for rows in ([*range(10)], *([t] for t in range(10, 40)))]
        for one in prompts
    ]  # fmt: skip
    for row in section.summary["hit_rate"]:
        if row["policy"] != "echo":
            continue
        replay = Replay(Echo(), row["slots"])
        for some in passes:
            steps = some if row["arm"] != "decode" else some[1:]
            events = events_of(Keys(shape), steps, shape.layers)
            _replay(replay, steps, events, shape.layers, told=True)
        assert row["hits"] == replay.hits, row
    assert any("choices alone" in note for note in section.notes) is not scored
