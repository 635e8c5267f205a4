"""What is compiled of a prediction: the same ranking as numpy's, whatever a layer, a choice or a processor is like."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.interfaces import Signals
from foregate.native import kernels
from foregate.native.matrix import BF16, F32, threads_asked, use_threads
from foregate.native.predict import available
from foregate.predictors.base import BasePredictor
from foregate.predictors.file import Artifact, ModelIdentity
from foregate.predictors.fusion import Fusion
from foregate.predictors.pre_attention import PreAttention
from foregate.types import Moment, Phase, Prediction, RoutingStep

EXPERTS, K, D, R = (40, 24, 40), 5, 48, 20
MODEL = ModelIdentity("made up", "0", EXPERTS, K, D)
Floats = NDArray[np.float32]

needs_kernels = pytest.mark.skipif(not available(), reason="no compiler made the kernels that these compare with numpy")


@pytest.fixture(params=[0, 1, 2], ids=["portable", "avx2", "avx512"])
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every instruction set up to the best of this machine."""
    found = kernels.library()
    assert found is not None
    found.foregate_kernels(request.param)
    yield
    found.foregate_kernels(2)


def some(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def fusion(hops: int) -> Fusion:
    layers, most = len(EXPERTS), max(EXPERTS)
    sizes = {
        "inward": (2 * D + most, R), "before": (hops * D, R), "gate": (most, R), "experts": (most, hops * D),
        "outward": (R, hops * D), "direct": (R, hops * most),
    }  # fmt: skip
    arrays = {f"{name}_weight": 0.2 * some(layers, *shape, seed=1) for name, shape in sizes.items()}
    arrays |= {f"{name}_bias": 0.2 * some(layers, shape[1], seed=2) for name, shape in sizes.items()}
    arrays |= {"router": some(layers, hops, most, D), "router_bias": some(layers, hops, most)}
    arrays["repeat"] = some(layers, hops, most, most)
    return Fusion.from_file(Artifact("fusion", MODEL, hops, arrays), hops)


def pre_attention(hops: int) -> PreAttention:
    layers, most = len(EXPERTS), max(EXPERTS)
    arrays = {"first": some(layers, D, R), "second": some(layers, R, most)}
    arrays |= {"first_bias": some(layers, R), "second_bias": some(layers, most)}
    options = {"previous": False, "activation": "gelu"}
    return PreAttention.from_file(Artifact("pre-attention", MODEL, hops, arrays, options), hops)


class States:
    """Hidden states of one token and layer, as numbers or (``place``) where they lie."""

    def __init__(self, layer: int, token: int, *, place: bool = False, told: RoutingStep | None = None) -> None:
        self.layer, self.moment, self._told = layer, Moment.AFTER_ROUTING, told
        self._at = {
            name: torch.from_numpy(some(1, D + 16, seed=100 * token + 10 * layer + n)).bfloat16()
            for n, name in enumerate(("residual", "pre_attention"))
        }
        self._place = place

    def hidden(self, name: str) -> Floats:
        return self._at[name].float().numpy()[0]

    def addresses(self, *names: str, numbers: int) -> tuple[tuple[int, ...], int] | None:
        return (tuple(self._at[name].data_ptr() for name in names), BF16) if self._place else None

    def choice_of(self, step: RoutingStep) -> tuple[int, int] | None:
        if not self._place or step is not self._told:
            return None
        return step.experts.ctypes.data, step.weights.ctypes.data


def step(layer: int, token: int) -> RoutingStep:
    """Choices with sentinels, negative and too large, and now and then fewer or more than the model's top-k."""
    rng = np.random.default_rng((layer, token))
    count = K + (token % 4 == 3) - (token % 4 == 2)
    ids = rng.permutation(EXPERTS[layer])[:count].astype(np.int64)
    ids[:2] = (-1, 10**6) if token % 3 == 1 else ids[:2]
    return RoutingStep(layer, Phase.DECODE, token, ids[None].copy(), rng.random((1, count), np.float32))


def predictions(predictor: Any, *, place: bool = False, asked: Callable[[int], bool] = bool) -> Iterator[Prediction]:
    """Of 8 tokens, at the layers whose turn, counted from 1, is to be ``asked``."""
    turn = 0
    for token in range(8):
        for layer in range(len(EXPERTS)):
            turn += 1
            told = step(layer, token)
            predictor.observe(told)
            if asked(turn):
                yield from predictor.predict(States(layer, token, place=place, told=told))


@needs_kernels
@pytest.mark.parametrize(
    "made", [lambda: fusion(1), lambda: fusion(2), lambda: pre_attention(0)], ids=["1", "2", "pre"]
)
def test_experts_and_scores_are_numpys(made: Callable[[], Any], level: None) -> None:
    compiled, plain = made(), made()
    assert compiled._kernel is not None
    plain._kernel = None
    for ours, theirs in zip(predictions(compiled), predictions(plain), strict=True):
        assert ours.layer == theirs.layer
        assert sorted(ours.experts) == list(range(EXPERTS[ours.layer % len(EXPERTS)]))
        assert list(ours.scores) == sorted(ours.scores, reverse=True)
        by_expert = dict(zip(theirs.experts, theirs.scores, strict=True))
        np.testing.assert_allclose(ours.scores, [by_expert[expert] for expert in ours.experts], rtol=2e-3, atol=2e-2)


@needs_kernels
@pytest.mark.parametrize("made", [lambda: fusion(2), lambda: pre_attention(0)], ids=["fusion", "pre-attention"])
@pytest.mark.parametrize("count", [1, 7, 30, 10**6])
def test_a_shorter_ranking_is_the_beginning_of_the_whole(made: Callable[[], Any], count: int) -> None:
    whole, short = made(), made()
    short.name_at_most(count)
    for one, other in zip(predictions(whole), predictions(short), strict=True):
        assert other == (one.layer, one.experts[:count], one.scores[:count])


@needs_kernels
def test_states_read_where_they_lie_are_those_that_are_told() -> None:
    assert list(predictions(fusion(2), place=True)) == list(predictions(fusion(2)))
    now_and_then = {"asked": lambda turn: turn % 3 == 1}
    some_of_them = list(predictions(fusion(2), place=True, **now_and_then))
    assert some_of_them == list(predictions(fusion(2), **now_and_then))
    assert len(some_of_them) > 8


@needs_kernels
def test_what_a_layer_chose_is_read_where_it_lies_unless_something_else_was_told() -> None:
    told, other = step(1, 0), step(1, 4)
    assert told.experts.shape == other.experts.shape == (1, K)

    def after(observed: RoutingStep, last: RoutingStep) -> list[Prediction]:
        predictor = fusion(2)
        predictor.observe(observed)
        return list(predictor.predict(States(1, 0, place=True, told=last)))

    assert after(told, told) != after(other, other)
    assert after(replace(told, experts=other.experts, weights=other.weights), told) == after(other, other)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Compute threads, another than the caller's being worth it for the smallest prediction."""
    before = threads_asked()
    monkeypatch.setattr("foregate.native.predict.WORTH_BEGINNING", 0)
    use_threads(request.param)
    yield request.param
    use_threads(before)


@needs_kernels
def test_another_thread_predicts_the_same(threads: int) -> None:
    alone, beside = fusion(2), fusion(2)
    weights, x = torch.randn(300, 64).bfloat16(), torch.randn(1, 64).bfloat16()
    product = kernels.linear(kernels.matrix(weights, None), x, 300)
    for token in range(8):
        for layer in range(len(EXPERTS)):
            told = step(layer, token)
            alone.observe(told)
            beside.observe(told)
            states = States(layer, token, place=True, told=told)
            end = beside.begin(states)
            # What else is computed meanwhile gives what it always gives.
            assert torch.equal(kernels.linear(kernels.matrix(weights, None), x, 300), product)
            assert end() == alone.predict(states)


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
def test_what_was_told_is_not_told_again(threads: int) -> None:
    end = fusion(2).begin(States(0, 1))
    end()
    with pytest.raises(RuntimeError, match="told before"):
        end()


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


class Looking(BasePredictor):
    """Compares what lies at the addresses with what is told."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        names = ("residual", "pre_attention", "router_input")
        told = [signals.hidden(name) for name in names]
        assert signals.addresses(*names, numbers=len(told[0]) + 1) is None
        places = signals.addresses(*names, numbers=len(told[0]))
        assert places is not None
        for at, expected in zip(places[0], told, strict=True):
            kind = {BF16: torch.bfloat16, F32: torch.float32}[places[1]]
            memory = (ctypes.c_char * (len(expected) * kind.itemsize)).from_address(at)
            np.testing.assert_array_equal(torch.frombuffer(bytearray(memory.raw), dtype=kind).float().numpy(), expected)
        self.seen.append(signals.layer)
        return [Prediction((signals.layer + 1) % signals.layers, (0, 1), (1.0, 0.5))]


def test_a_live_model_says_where_its_states_lie(tiny: Callable[[str], Path]) -> None:
    with Engine(RunConfig(model=str(tiny("qwen3_moe")), predictor="next-gate", memory_budget="50%")) as engine:
        looking = engine.runtime.predictor = Looking()
        list(engine.stream([5, 9, 30, 7, 7, 12], SamplingConfig(max_new_tokens=5)))
        assert set(looking.seen) >= set(range(engine.spec.layers - 1))
        assert not engine.prefetcher.controller.off_reason
