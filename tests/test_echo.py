"""The policy ``echo``: what it must keep and forget on small sequences, and its arithmetic against plain loops."""

from __future__ import annotations

import math
import random
from time import process_time

import numpy as np
import pytest
from numpy.typing import NDArray

from foregate.experts import echo
from foregate.experts.echo import Echo
from foregate.experts.policy import Lru
from foregate.native.echo import available
from foregate.types import ExpertKey

E, K = 8, 2
Rows = NDArray[np.float32]


@pytest.fixture(params=[True, False], ids=["compiled", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernels compute: tests that ask for it run both ways."""
    if request.param and not available():
        pytest.skip("the kernels are not built")
    if not request.param:
        monkeypatch.setattr(echo, "available", lambda: False)
    return bool(request.param)


def chosen(scores: Rows) -> NDArray[np.int64]:
    return np.argsort(-scores, axis=1, kind="stable")[:, :K].astype(np.int64)


def shares(row: list[float]) -> list[float]:
    powers = [math.exp(x) for x in row]
    return [x / sum(powers) for x in powers]


def unit(row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    length = math.sqrt(sum((x - mean) ** 2 for x in row))
    return [(x - mean) / length for x in row]


def naive_worth(scores: list[list[float]], experts: list[list[int]]) -> list[float]:
    """The definition, one token and one expert at a time, in double precision."""
    now = len(scores) - 1
    p = [shares(row) for row in scores]
    keys = [unit(row) for row in scores]
    votes = [math.exp(10 * sum(a * b for a, b in zip(keys[t], keys[now], strict=True))) for t in range(now)]
    reach = [0.85**ago for ago in range(8)]
    worth = []
    for e in range(E):
        means = []
        for half in (2, 8, 32):
            rate, mean = 1 - 0.5 ** (1 / half), 1 / E
            for row in p:
                mean += rate * (row[e] - mean)
            means.append(mean)
        mean = 1 / E
        for ids in experts:
            mean += (1 - 0.5 ** (1 / 32)) * ((e in ids) / K - mean)
        future = [sum(f * p[t + 1 + n][e] for n, f in enumerate(reach) if t + 1 + n <= now) for t in range(now)]
        vote = sum(v * f for v, f in zip(votes, future, strict=True)) / sum(votes) / sum(reach) if now else means[0]
        logs = [math.log(E * x + echo.FLOOR) for x in (*means, mean, vote)]
        z = sum(w * x for w, x in zip(echo.SCORE_WEIGHTS.tolist(), logs, strict=True)) + echo.SCORE_BIAS
        worth.append(-math.log1p(math.exp(-z)))
    return worth


@pytest.mark.parametrize("chunks", [[1] * 40, [25] + [1] * 10, [3, 1, 7, 1, 1, 12]], ids=["decode", "prompt", "mixed"])
def test_worth_is_the_definition_whether_tokens_come_alone_or_together(chunks: list[int], way: bool) -> None:
    rng = np.random.default_rng(len(chunks))
    policy, scores, experts = Echo(), np.zeros((0, E), np.float32), np.zeros((0, K), np.int64)
    for tokens in chunks:
        new = (2 * rng.standard_normal((tokens, E))).astype(np.float32)
        policy.observe(0, chosen(new), new)
        scores, experts = np.concatenate([scores, new]), np.concatenate([experts, chosen(new)])
        found = policy._pasts[0].worth()
        assert found == pytest.approx(naive_worth(scores.tolist(), experts.tolist()), abs=2e-4)


def test_a_full_window_forgets_the_oldest_tokens_and_nothing_else(way: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(echo, "MOST_TOKENS", 16)
    rng = np.random.default_rng(3)
    scores = (2 * rng.standard_normal((100, E))).astype(np.float32)
    policy = Echo()
    for token, row in enumerate(scores):
        policy.observe(0, chosen(row[None]), row[None])
        past = policy._pasts[0]
        worth = past.worth().copy()
        past._native, native = None, past._native
        assert worth == pytest.approx(past.worth(), abs=2e-5), f"numpy's, after {token + 1} tokens"
        past._native = native
    votes = past._votes()
    late = Echo()
    late.observe(0, chosen(scores[-17:-8]), scores[-17:-8])
    late.observe(0, chosen(scores[-8:]), scores[-8:])
    assert votes == pytest.approx(late._pasts[0]._votes(), abs=1e-5)


def touched(policy: Echo, layer: int, experts: list[int], scores: Rows | None = None) -> None:
    if scores is not None:
        policy.observe(layer, np.array([experts]), scores)
    for expert in experts:
        policy.touch(ExpertKey(layer, expert))


def test_the_layer_that_has_just_run_is_forgotten_before_the_one_that_runs_next() -> None:
    policy = Echo()
    for _ in range(60):
        for layer in range(4):
            touched(policy, layer, [0])
    touched(policy, 0, [0])
    touched(policy, 1, [0])
    keys = [ExpertKey(layer, 0) for layer in range(4)]
    order = []
    for _ in range(4):
        order.append(policy.victim(keys))
        keys.remove(order[-1])
    assert [key.layer for key in order] == [1, 0, 3, 2]


@pytest.mark.parametrize("scored", [True, False], ids=["scores", "choices"])
def test_what_followed_a_routing_like_this_one_is_kept_and_lru_would_forget_it(scored: bool) -> None:
    """A cycle 0, 1, 2, 3, 4: after 4 comes 0, which LRU evicts first."""
    policy, plain = Echo(), Lru()
    for step in range(40):
        expert = step % 5
        scores = np.where(np.arange(5) == expert, 4.0, 0.0)[None].astype(np.float32) if scored else None
        touched(policy, 0, [expert], scores)
        touched(policy, 1, [0], None if scores is None else np.ones((1, 1), np.float32))
        plain.touch(ExpertKey(0, expert))
    keys = [ExpertKey(0, expert) for expert in range(4)]  # 4 is in use
    assert plain.victim(keys) == ExpertKey(0, 0)
    assert policy.victim(keys) == ExpertKey(0, 3)


def test_a_near_miss_outlives_an_expert_that_the_router_never_considered() -> None:
    policy = Echo()
    scores = np.array([[3.0, 2.9, -3.0, -3.0]], np.float32)
    for expert in (1, 2):
        policy.touch(ExpertKey(0, expert))
    for _ in range(5):
        touched(policy, 0, [0], scores)
    assert policy.victim([ExpertKey(0, 1), ExpertKey(0, 2)]) == ExpertKey(0, 2)


def test_what_was_popular_long_ago_is_forgotten() -> None:
    """Counts that never decay keep the experts of an earlier domain."""
    policy = Echo()
    for expert in [0] * 300 + [1, 2] * 60:
        touched(policy, 0, [expert])
    assert policy.victim([ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(0, 2)]) == ExpertKey(0, 0)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_masked_scores_are_not_believed_and_poison_nothing(bad: float, way: bool) -> None:
    policy = Echo()
    for step in range(20):
        scores = np.full((1, E), bad if step == 5 else 0.0, np.float32)
        scores[0, step % E] = 3.0
        touched(policy, 0, [step % E], scores)
        policy.victim([ExpertKey(0, step % E)])
    assert np.isfinite(policy._worth).all()


@pytest.mark.parametrize("alone", [False, True], ids=["a prompt", "one by one"])
def test_probabilities_are_not_taken_for_logits(alone: bool, way: bool) -> None:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((30, E)).astype(np.float32) * 3
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    policy = Echo()
    for rows in np.split(p, 30) if alone else [p]:
        policy.observe(0, chosen(rows), rows)
    assert policy._pasts[0].means[2] == pytest.approx(
        [naive_mean([row[e] for row in p.tolist()], 1 - 0.5 ** (1 / 32)) for e in range(E)], abs=1e-5
    )


def naive_mean(values: list[float], rate: float) -> float:
    mean = 1 / E
    for value in values:
        mean += rate * (value - mean)
    return mean


def test_sentinels_and_layers_of_different_width_are_harmless(way: bool) -> None:
    policy = Echo()
    policy.observe(0, np.array([[0, 8]]), np.ones((1, 8), np.float32))  # 8: an expert of another rank
    policy.observe(1, np.array([[3, -1]]), np.ones((1, 4), np.float32))
    policy.observe(1, np.array([[15, -1]]), None)
    policy.observe(1, np.array([[3, -1]]), np.ones((1, 4), np.float32))
    for key in (ExpertKey(0, 0), ExpertKey(1, 15)):
        policy.touch(key)
    assert policy.victim([ExpertKey(1, 15)]) == ExpertKey(1, 15)


def test_among_many_pinned_the_lowest_candidate_is_found(way: bool) -> None:
    rng = random.Random(2)
    policy = Echo()
    for _ in range(200):
        touched(policy, rng.randrange(4), rng.sample(range(32), 4))
    held = [ExpertKey(layer, e) for layer in range(4) for e in range(32) if policy._held[layer, e]]
    order, left = [], list(held)
    while left:
        order.append(policy.victim(left))
        left.remove(order[-1])
    for few in (1, 5, 40):
        assert policy.victim(order[-few:]) == order[-few]


def test_a_victim_and_an_observation_cost_microseconds_not_milliseconds() -> None:
    """512 experts: about 15 and 35 µs of CPU time when nothing else runs; a scan in Python would take a millisecond."""
    rng = np.random.default_rng(0)
    policy = Echo()
    rows = rng.standard_normal((1200, 32)).astype(np.float32)
    experts = np.argsort(-rows, axis=1)[:, :4]
    for layer in range(16):
        policy.observe(layer, experts, rows)
        for expert in range(32):
            policy.touch(ExpertKey(layer, expert))
    keys = {ExpertKey(layer, expert) for layer in range(16) for expert in range(32)}
    began = process_time()
    for step in range(320):
        policy.observe(step % 16, experts[step : step + 1], rows[step : step + 1])
        policy.victim(keys)
    assert (process_time() - began) / 320 < 1e-3


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (60, 4), (128, 8)])
@pytest.mark.parametrize("scored", [True, False], ids=["scores", "choices"])
def test_one_token_alone_teaches_what_a_prompt_of_one_does(experts: int, k: int, scored: bool, way: bool) -> None:
    """In numpy to the bit, compiled up to rounding."""
    rng = np.random.default_rng(experts)
    policy, past = Echo(), echo._Past(experts)
    past.scored = scored
    for _ in range(40):
        raw = (2 * rng.standard_normal((1, experts))).astype(np.float32)
        ids = np.argsort(-raw, axis=1)[:, :k].astype(np.int64)
        ids[0, -1] = -1 if rng.random() < 0.2 else ids[0, -1]
        hot = echo._hot(ids, experts)
        if not policy._pasts:
            policy._make(0, None, experts)
        policy.observe(0, ids, raw if scored else None)
        past.see(echo._softmax(raw) if scored else hot, hot, echo._unit(raw if scored else hot))
        near = 2e-5 if way else 0.0
        np.testing.assert_allclose(policy.worth(0), past.worth(), rtol=near, atol=near)
        np.testing.assert_allclose(policy.features(0), past.features(), rtol=near, atol=10 * near)


def test_the_compiled_lowest_is_numpys(way: bool) -> None:
    rng = np.random.default_rng(5)
    policy, held = Echo(), set()
    for step in range(200):
        layer = step % 5
        raw = rng.standard_normal((1, 12)).astype(np.float32)
        ids = chosen(raw)
        policy.observe(layer, ids, raw)
        for expert in ids[0].tolist():
            policy.touch(ExpertKey(layer, expert))
            held.add(ExpertKey(layer, expert))
        victim = policy.victim(held)
        worth = {key: policy.worth(key.layer)[key.expert] - ((key.layer - layer - 1) % 5) / 20 for key in held}
        assert worth[victim] == pytest.approx(min(worth.values()), abs=1e-5)
        policy.forget(victim)
        held.remove(victim)
