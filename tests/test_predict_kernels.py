"""What is compiled of a prediction: the same ranking as numpy's, whatever a layer, a choice or a processor is like."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
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
from foregate.native.matrix import BF16, F32
from foregate.native.predict import available
from foregate.native.products import Rows
from foregate.predictors.base import BasePredictor
from foregate.predictors.estimator import Estimator, Hybrid
from foregate.predictors.file import Artifact, ModelIdentity
from foregate.predictors.fitted import NOBODY
from foregate.predictors.fusion import Fusion
from foregate.predictors.history import HistoryLstm, HistoryMlp, HistoryTransformer
from foregate.predictors.ids_mlp import IdsMlp
from foregate.predictors.markov import Markov
from foregate.predictors.pre_attention import PreAttention
from foregate.predictors.sequence import Sequence as Recurrent
from foregate.types import Moment, Phase, Prediction, RoutingStep

EXPERTS, K, D, R = (40, 24, 40), 5, 48, 20
E, L = max(EXPERTS), len(EXPERTS)
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


def made_of(method: type[Any], hops: int, shapes: dict[str, tuple[int, ...]], **options: Any) -> Any:
    """One of ``method`` whose arrays are random."""
    arrays: dict[str, NDArray[Any]] = {name: 0.3 * some(*shape, seed=len(name)) for name, shape in shapes.items()}
    if "estimated" in arrays:
        arrays["estimated"] = np.array([[1] * hops, [0] * hops, [1, 0, 0][:hops]])
    return method.from_file(Artifact(method.name, MODEL, hops, arrays, options), hops)


def linears(**shapes: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Weight and bias of each [N, K]."""
    weights: dict[str, tuple[int, ...]] = {f"{name}_weight": shape for name, shape in shapes.items()}
    return weights | {f"{name}_bias": shape[:1] for name, shape in shapes.items()}


def history_mlp(hops: int = 2) -> Any:
    shapes = linears(first=(R, 2 * E + L), second=(R, R), third=(hops * E, R))
    return made_of(HistoryMlp, hops, shapes, window=2)


def history_lstm(hops: int = 2) -> Any:
    shapes = linears(head=(hops * E, R))
    for number, inputs in enumerate((E, R)):
        for part, size in (("ih", inputs), ("hh", R)):
            shapes |= {f"lstm_weight_{part}_l{number}": (4 * R, size), f"lstm_bias_{part}_l{number}": (4 * R,)}
    return made_of(HistoryLstm, hops, shapes)


def history_transformer(hops: int = 2, window: int = 2) -> Any:
    shapes = linears(embed=(R, E), head=(hops * E, R)) | {"positions": (L, R)}
    for block in ("blocks_0_", "blocks_1_"):
        parts = {"qkv": (3 * R, R), "out": (R, R), "up": (4 * R, R), "down": (R, 4 * R)}
        shapes |= linears(**{block + part: shape for part, shape in parts.items()})
        shapes |= {f"{block}{norm}_{part}": (R,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    return made_of(HistoryTransformer, hops, shapes, window=window, heads=4)


def ids_mlp(hops: int = 2) -> Any:
    shapes = linears(first=(R, E * (1 + 2 * hops) + L), second=(R, R), third=(hops * E, R))
    return made_of(IdsMlp, hops, shapes | {"popularity": (L, E), "affinity": (hops, L, E, E)})


def estimator(method: type[Estimator] = Estimator, hops: int = 2) -> Any:
    shapes = linears(first=(R, hops * D + 6), second=(hops * E, R)) | {"norm": (L, hops, D), "layer": (L, 6)}
    if method is Hybrid:
        shapes |= {"estimated": (L, hops), "router": (L, hops, E, D), "router_bias": (L, hops, E)}
    return made_of(method, hops, shapes)


def sequence(hops: int = 2) -> Any:
    shapes = linears(ahead=(R, R), within=(R, R)) | {"embed": (L, E, R), "layer": (L, R)}
    for way in ("ih", "hh"):
        shapes |= {f"gru_weight_{way}_l0": (3 * R, R), f"gru_bias_{way}_l0": (3 * R,)}
    shapes |= {"head": (L, E, R), "next_head": (L, E, R), "head_bias": (L, E), "next_bias": (L, E)}
    return made_of(Recurrent, hops, shapes)


def markov(hops: int = 2) -> Any:
    return made_of(Markov, hops, {"transition": (hops, L, E, E)})


MADE: dict[str, Callable[[], Any]] = {
    "fusion-1": lambda: fusion(1), "fusion-2": lambda: fusion(2), "pre-attention": lambda: pre_attention(0),
    "history-mlp": history_mlp, "history-lstm": history_lstm, "history-transformer": history_transformer,
    "history-transformer-long": lambda: history_transformer(1, 40), "ids-mlp": ids_mlp, "estimator": estimator,
    "hybrid": lambda: estimator(Hybrid), "sequence": sequence, "markov": markov,
}  # fmt: skip

every_method = pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())


def without_kernel(predictor: Any) -> Any:
    """Computed by numpy, with the same rounded weights."""
    assert getattr(predictor, "_kernels", None) or predictor._kernel is not None
    predictor._kernel, predictor._kernels, predictor._gru = None, [None] * L, None
    return predictor


class States:
    """Hidden states of one token and layer, as numbers or (``place``) where they lie."""

    layers = L

    def __init__(
        self, layer: int, token: int, *, place: bool = False, told: RoutingStep | None = None, silent: bool = False
    ) -> None:
        self.layer, self.moment, self._told, self._silent = layer, Moment.AFTER_ROUTING, told, silent
        self._at = {
            name: torch.from_numpy(some(1, D + 16, seed=100 * token + 10 * layer + n)).bfloat16()
            for n, name in enumerate(("residual", "pre_attention"))
        }
        self._place = place

    def hidden(self, name: str) -> Floats:
        assert not self._silent, "where it lies is known"
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
    ids[:2] = (-1, 10**6 if token % 2 else EXPERTS[layer]) if token % 3 == 1 else ids[:2]
    return RoutingStep(layer, Phase.DECODE, token, ids[None].copy(), rng.random((1, count), np.float32))


def predictions(
    predictor: Any, *, place: bool = False, asked: Callable[[int], bool] = bool, silent: bool = False
) -> Iterator[Prediction]:
    """Of 8 tokens, at the layers whose turn, counted from 1, is to be ``asked``; ``silent``: by addresses alone."""
    turn = 0
    for token in range(8):
        for layer in range(len(EXPERTS)):
            turn += 1
            told = step(layer, token)
            predictor.observe(told)
            if asked(turn):
                yield from predictor.predict(States(layer, token, place=place, told=told, silent=silent))


@needs_kernels
@every_method
@pytest.mark.parametrize("rare", [1, 2])
def test_experts_and_scores_are_numpys(made: Callable[[], Any], rare: int, level: None) -> None:
    asked = {"asked": lambda turn: turn % rare == 0}
    compiled, plain = predictions(made(), **asked), predictions(without_kernel(made()), **asked)
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours.layer == theirs.layer
        assert sorted(ours.experts) == list(range(EXPERTS[ours.layer % len(EXPERTS)]))
        assert list(ours.scores) == sorted(ours.scores, reverse=True)
        by_expert = dict(zip(theirs.experts, theirs.scores, strict=True))
        np.testing.assert_allclose(ours.scores, [by_expert[expert] for expert in ours.experts], rtol=2e-3, atol=2e-2)


@needs_kernels
@every_method
@pytest.mark.parametrize("count", [1, 7, 30, 10**6])
def test_a_shorter_ranking_is_the_beginning_of_the_whole(made: Callable[[], Any], count: int) -> None:
    whole, short = made(), made()
    short.name_at_most(count)
    for one, other in zip(predictions(whole), predictions(short), strict=True):
        assert other == (one.layer, one.experts[:count], one.scores[:count])


@needs_kernels
@pytest.mark.parametrize(
    "made", [lambda: fusion(2), lambda: pre_attention(0), estimator, history_lstm, history_transformer]
)
def test_states_read_where_they_lie_are_those_that_are_told(made: Callable[[], Any]) -> None:
    places: dict[str, Any] = {"place": True, "silent": True}
    assert list(predictions(made(), **places)) == list(predictions(made()))
    now_and_then: dict[str, Any] = {"asked": lambda turn: turn % 2 == 0}
    some_of_them = list(predictions(made(), **places, **now_and_then))
    assert some_of_them == list(predictions(made(), **now_and_then))
    assert len(some_of_them) >= 12


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


class Elsewhere(States):
    """Where another choice lies than the one that was told."""

    def choice_of(self, step: RoutingStep) -> tuple[int, int] | None:
        assert self._told is not None
        return self._told.experts.ctypes.data, self._told.weights.ctypes.data


@needs_kernels
@pytest.mark.parametrize("made", [lambda: fusion(2), history_lstm, history_transformer])
def test_a_choice_is_read_where_it_is_said_to_lie(made: Callable[[], Any]) -> None:
    told, other = step(1, 0), step(1, 4)

    def after(observed: RoutingStep, states: States) -> list[Prediction]:
        predictor = made()
        predictor.observe(observed)
        return list(predictor.predict(states))

    assert after(told, Elsewhere(1, 0, place=True, told=other)) == after(other, States(1, 0))
    assert after(told, States(1, 0)) != after(other, States(1, 0))


@needs_kernels
def test_a_prompt_and_a_new_sequence_step_the_compiled_unit(level: None) -> None:
    def after(predictor: Any, seed: int) -> list[Prediction]:
        rng = np.random.default_rng(seed)
        for count, layer in product((9, 1), range(L)):  # heads see the state that the token before has left
            ids = rng.integers(-1, EXPERTS[layer] + 1, (count, K))
            predictor.observe(RoutingStep(layer, Phase.PREFILL, 0, ids, rng.random((count, K), np.float32)))
        return [told for layer in range(L) for told in predictor.predict(States(layer, 0))]

    compiled, plain = sequence(), without_kernel(sequence())
    first = after(compiled, 1)
    assert first != after(compiled, 2)
    compiled.reset()
    assert after(compiled, 1) == first
    for ours, theirs in zip(first, after(plain, 1), strict=True):
        assert ours.layer == theirs.layer
        by_expert = dict(zip(theirs.experts, theirs.scores, strict=True))
        np.testing.assert_allclose(ours.scores, [by_expert[expert] for expert in ours.experts], rtol=2e-3, atol=2e-2)


@needs_kernels
def test_a_choice_of_the_last_sequence_is_not_kept_in_the_next() -> None:
    predictor = fusion(2)
    predictor.observe(step(1, 0))
    predictor.reset()
    predictor.observe(step(0, 4))
    assert predictor._ids.tolist() == [[NOBODY] * K] * L


@needs_kernels
def test_rows_of_no_expert_add_nothing() -> None:
    rows, out = Rows(some(2, 4, 7), exact=True), some(7, seed=5)
    ids, factors = np.array([9, 2, -1, 0], np.int64), some(4, seed=6)
    for given, times in ((factors, factors[[1, 3]]), (None, np.ones(2, np.float32))):
        expected = out + times @ rows.of(1, ids[[1, 3]])
        rows.add(1, ids, given, out)
        np.testing.assert_allclose(out, expected, rtol=1e-5)


@needs_kernels
@pytest.mark.parametrize("method", [history_mlp, history_lstm, history_transformer, ids_mlp, sequence, markov])
def test_a_lookahead_of_more_than_all_layers_is_all_of_them(method: Callable[[int], Any]) -> None:
    compiled, plain = method(L + 2), without_kernel(method(L + 2))
    for ours, theirs in zip(predictions(compiled), predictions(plain), strict=True):
        assert (ours.layer, sorted(ours.experts)) == (theirs.layer, sorted(theirs.experts))


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
    config = RunConfig(model=str(tiny("qwen3_moe")), predictor="next-gate", memory_budget="50%", prefetch="2")
    with Engine(config) as engine:  # a fixed limit: on a busy disk the controller would not ask
        looking = engine.runtime.predictor = Looking()
        list(engine.stream([5, 9, 30, 7, 7, 12], SamplingConfig(max_new_tokens=5)))
        assert set(looking.seen) >= set(range(engine.spec.layers - 1))
        assert not engine.prefetcher.controller.off_reason
