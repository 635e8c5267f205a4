"""The comparison of eviction policies: Belady is its upper end, LRU its zero, and scores reach the policy that asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import foregate
from foregate.analysis.eviction import Pass, Passes, compare, fit, gap_closed, held_out
from foregate.analysis.prompt import Shape
from foregate.errors import TraceError
from foregate.experts.policy import POLICIES

SAMPLE = Path(foregate.__file__).parent / "trace" / "reference-sample"
SHAPE = Shape((8, 8, 8), (2, 2, 2))


def cyclic(tokens: int, offset: int) -> Passes:
    """Routing with a period of four tokens, in which LRU always forgets what comes next."""
    passes = []
    for token in range(tokens):
        pair = [2 * ((token + offset) % 4), 2 * ((token + offset) % 4) + 1]
        scores = np.where(np.isin(np.arange(8), pair), 3.0, -1.0).astype(np.float32)
        passes.append(Pass(np.array([[pair] * 3]), np.broadcast_to(scores, (1, 3, 8)).copy()))
    return passes


def test_belady_closes_the_whole_gap_and_echo_most_of_it_where_routing_repeats() -> None:
    rows = compare("arm", [cyclic(60, n) for n in range(3)], SHAPE, 0.5, cold=False)
    closed = {row["policy"]: row["gap_closed"] for row in rows}
    assert set(closed) == {*POLICIES.names, "echo (choices)", "belady"}
    assert (closed["lru"], closed["belady"]) == (0, 1)
    assert closed["echo"] > 0.7
    assert closed["echo (choices)"] > 0.5


def test_an_interval_that_does_not_hold_its_own_estimate() -> None:
    rng = np.random.default_rng(0)
    lru = np.stack([rng.integers(10, 20, 30), np.full(30, 100)], axis=1)
    share, low, high = gap_closed(lru + np.array([5, 0]), lru, lru + np.array([10, 0]))
    assert share == pytest.approx(0.5)
    assert low <= share <= high


def test_weights_that_cannot_be_fitted_again() -> None:
    weights, bias = fit([cyclic(150, n) for n in range(2)], 3, told=True)
    assert np.isfinite([*weights, bias]).all()
    assert weights[-1] > 0


def test_the_shipped_sample_has_held_out_prompts_and_a_pool_below_one_layer_is_refused() -> None:
    shape, prompts = held_out([SAMPLE], 2, ["test", "validation"], prefill=True)
    assert min(map(len, prompts)) > 1
    with pytest.raises(TraceError, match="fewer than one layer chooses"):
        compare("arm", prompts, shape, 0.001, cold=True)
