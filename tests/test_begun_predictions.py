"""Predictions that have begun: another thread computes them, and they are told, dropped or asked again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import ref

import pytest
import torch

from foregate.native import kernels, products
from foregate.native.library import calls
from foregate.native.matrix import threads_asked, use_threads
from test_predict_kernels import EXPERTS, D, K, L, States, every_method, fusion, needs_kernels, some, step

POSTED = 2
"""State of a question that another thread has."""


@pytest.fixture(params=[0, 1, 2, 3], ids=["slow", "1", "2", "3"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Compute threads, another than the caller's being worth it for the smallest prediction. ``slow``: without call.c,
    which is all that lets another thread begin."""
    before = threads_asked()
    found = kernels.called, products._add_rows
    if request.param == 0:
        forget(found)
        for module in ("asking", "library", "products"):
            monkeypatch.setattr(f"foregate.native.{module}.calls", lambda: None)
    for module in ("predict", "history"):
        monkeypatch.setattr(f"foregate.native.{module}.WORTH_BEGINNING", 0)
    use_threads(max(1, request.param))
    yield request.param
    use_threads(before)
    if request.param == 0:
        forget(found)


def forget(found: Iterable[Any]) -> None:
    """Functions that were looked up with call.c, or without, are looked up again."""
    for one in found:
        one.cache_clear()


@needs_kernels
@every_method
def test_another_thread_predicts_the_same(made: Callable[[], Any], threads: int) -> None:
    alone, beside = made(), made()
    weights, x = torch.randn(300, 64).bfloat16(), torch.randn(1, 64).bfloat16()
    expected = kernels.linear(kernels.matrix(weights, None), x, 300)
    for token in range(8):
        for layer in range(len(EXPERTS)):
            told = step(layer, token)
            alone.observe(told)
            beside.observe(told)
            states = States(layer, token, place=True, told=told)
            end = beside.begin(states)
            # What else is computed meanwhile gives what it always gives.
            assert torch.equal(kernels.linear(kernels.matrix(weights, None), x, 300), expected)
            assert end() == alone.predict(states)


@needs_kernels
def test_what_is_kept_lives_until_the_answer(threads: int) -> None:
    class Kept:
        pass

    kept = Kept()
    lives, states = ref(kept), States(0, 1, place=True)
    predictor: Any = fusion(2)
    kernel = predictor._kernel
    ask = kernel._free(0)
    _, *question = predictor._question(states)
    end = ask.begin(kept, *kernel._arguments(*question), max(1, threads))
    del kept
    assert lives() is not None
    assert end() == fusion(2).predict(states)
    assert lives() is None


@needs_kernels
def test_predictions_that_have_begun_at_once_keep_apart(threads: int) -> None:
    predictors, states = [fusion(hops) for hops in (1, 2, 3)], States(1, 4)
    ends = [predictor.begin(states) for predictor in predictors]
    told = [end() for end in reversed(ends)][::-1]
    assert told == [fusion(hops).predict(states) for hops in (1, 2, 3)]


@needs_kernels
def test_a_prediction_that_nobody_asks_for_harms_nothing(threads: int) -> None:
    expected = fusion(2).predict(States(0, 1))
    for _ in range(50):
        dropped, states = fusion(2), States(0, 2)
        dropped.begin(states)
        del dropped
        predictor = fusion(2)
        predictor.begin(States(0, 3))
        assert predictor.begin(States(0, 1))() == expected


@needs_kernels
def test_a_second_question_leaves_the_first_one_open(threads: int) -> None:
    predictor, first, second = fusion(2), States(0, 1, place=True), States(0, 2, place=True)
    expected = [fusion(2).predict(states) for states in (first, second)]
    ends = [predictor.begin(states) for states in (first, second)]
    assert predictor.predict(second) == expected[1]
    assert [end() for end in ends] == expected
    dropped = predictor.begin(first)
    end = predictor.begin(second)
    del dropped
    assert end() == expected[1]


@needs_kernels
@every_method
def test_a_question_that_is_thrown_away_reads_what_it_was_given_till_the_end(
    made: Callable[[], Any], threads: int
) -> None:
    for _ in range(5):
        predictor = made()
        for layer in range(L):
            predictor.observe(step(layer, 0))
        end = predictor.begin(States(L - 1, 0))
        if threads > 1 and "fusion" not in predictor.name and getattr(predictor, "_kernels", None) is None:
            assert predictor._kernel._ask[L - 1].open == POSTED
        del predictor
        del end
        some(1 << 16)


@needs_kernels
def test_what_was_told_is_not_told_again(threads: int) -> None:
    end = fusion(2).begin(States(0, 1))
    end()
    with pytest.raises(RuntimeError, match="told before"):
        end()


@needs_kernels
def test_who_has_begun_is_not_asked_before_it_has_told(threads: int) -> None:
    predictor: Any = fusion(2)
    states = States(0, 1)
    end = predictor.begin(states)
    ask = predictor._kernel._ask[0]
    if threads and calls() is not None:
        assert ask.open
        with pytest.raises(RuntimeError, match="asked again"):
            ask()
        with pytest.raises(RuntimeError, match="begun again"):
            ask.begin(None)
    assert end() == fusion(2).predict(states)
    assert not ask.open
    assert predictor.predict(states) == fusion(2).predict(states)


@needs_kernels
@pytest.mark.parametrize("most", [1, 4, 6, 40])
def test_a_router_asked_beside_ranks_alike(most: int, threads: int) -> None:
    gate, x = torch.from_numpy(some(40, D)).bfloat16(), torch.from_numpy(some(1, D)).bfloat16()
    ranker = kernels.Ranker(gate, None, K)
    ended = ranker.begin(3, x.data_ptr(), most)()
    assert ended is not None
    assert ended == ranker.best(3, x.data_ptr(), most)
    whole = ranker(x)
    assert whole is not None
    assert ended.experts == tuple(whole[0][:most].tolist())
    other = torch.from_numpy(some(1, D, seed=9)).bfloat16()
    ends = [ranker.begin(3, row.data_ptr(), most) for row in (x, other, x)]
    between = ranker.best(3, other.data_ptr(), most)
    assert [end() for end in ends] == [ended, between, ended]
    tied = kernels.Ranker(torch.zeros_like(gate), None, K)
    assert tied.begin(3, x.data_ptr(), most)() is None
