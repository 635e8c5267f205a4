"""Experts that the kernels begin as soon as a layer has routed: only what is resident, only while nobody minds, and the
same tokens as without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter_ns, sleep
from typing import Any

import numpy as np
import pytest

from foregate.config import RunConfig, SamplingConfig
from foregate.engine import dense
from foregate.engine.clock import Clock
from foregate.engine.decode_step import DecodeStep
from foregate.engine.engine import Engine
from foregate.engine.following import Following
from foregate.engine.runtime import ExpertRuntime
from foregate.engine.signals import ModelSignals
from foregate.experts.compute import Ended, Weights
from foregate.native import kernels
from foregate.native.decoder_layer import DecoderLayer
from foregate.predictors.base import BasePredictor
from foregate.prefetch.pipeline import Pipeline
from foregate.prefetch.prefetcher import Prefetcher
from foregate.testing.tiny import build
from foregate.types import ExpertKey, Moment, Prediction, RoutingStep
from test_begun_experts import HIDDEN, begin
from test_kernels import expert, inputs

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the compiled kernels were not built")

PROMPT, TOKENS = [1, 2, 3, 4], 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return str(build("qwen3_moe", tmp_path_factory.mktemp("model"), dtype="bfloat16", **sizes))


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "SMALLEST", 1)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[list[ExpertKey]]:
    """By layer of every token, what its kernel had begun; that it was resident is looked at."""
    seen: list[list[ExpertKey]] = []
    forward_one = ExpertRuntime.forward_one

    def watched(self: ExpertRuntime, layer: int, module: Any, kernel: DecoderLayer, then: Following) -> None:
        residents = kernel.residents
        assert residents is not None
        chosen = kernel.choice.experts[0].tolist()
        there = [ExpertKey(layer, e) for rank, e in enumerate(chosen) if residents.begun >> rank & 1]
        assert all(self._cache.lookup(key) is not None for key in there)
        seen.append(there)
        forward_one(self, layer, module, kernel, then)
        self._cache.check_integrity()

    monkeypatch.setattr(ExpertRuntime, "forward_one", watched)
    return seen


def settings(model: str, **changes: Any) -> RunConfig:
    given = {"model": model, "memory_budget": "50%", "predictor": "next-gate", "prefetch": "2", "threads": 2}
    return RunConfig(**{**given, **changes})


def tokens(engine: Engine) -> list[int]:
    return [step.token_id for step in engine.stream(PROMPT, SamplingConfig(max_new_tokens=TOKENS))]


@pytest.mark.parametrize("budget", ["30%", "50%", "100%"])
def test_what_is_resident_is_begun_and_the_tokens_stay(
    model: str, begun: list[list[ExpertKey]], monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    with Engine(settings(model, memory_budget=budget)) as engine:
        found = [tokens(engine), tokens(engine)]
        layers = engine.spec.layers
    assert len(begun) == 2 * layers * (TOKENS - 1)
    assert any(begun)
    monkeypatch.setattr(DecoderLayer, "__call__", _without(DecoderLayer.__call__))
    go_on = DecoderLayer.go_on
    monkeypatch.setattr(DecoderLayer, "go_on", lambda *given: _without(lambda _: go_on(*given))(given[2][0]))
    with Engine(settings(model, memory_budget=budget)) as engine:
        assert [tokens(engine), tokens(engine)] == found
    assert not any(begun[len(begun) // 2 :])


def _without(call: Callable[..., Any]) -> Callable[..., Any]:
    """A layer that begins nothing."""

    def alone(self: DecoderLayer, *given: Any) -> Any:
        there, self._layer.there = self._layer.there, None
        if self.residents is not None:
            self.residents._told.begun = 0
        try:
            return call(self, *given)
        finally:
            self._layer.there = there

    return alone


Gone = list[tuple[int, bool]]
"""Of every ``go_on``: the number that it was given, and whether it did anything."""


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> Gone:
    seen: Gone = []
    go_on = DecoderLayer.go_on

    def watched(self: DecoderLayer, number: int, following: Any) -> Any:
        told = go_on(self, number, following)
        seen.append((number, told is not None))
        return told

    monkeypatch.setattr(DecoderLayer, "go_on", watched)
    return seen


@pytest.fixture(scope="module")
def all_ours(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of six layers, each of them compiled."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6}
    made = build("qwen3_moe", tmp_path_factory.mktemp("model"), dtype="bfloat16", mlp_only_layers=[], **sizes)
    return str(made)


@pytest.mark.parametrize("budget", ["20%", "50%", "100%"])
def test_a_layer_goes_on_to_the_next_in_one_call(
    all_ours: str, gone: Gone, monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    with Engine(settings(all_ours, memory_budget=budget)) as engine:
        found, between = [tokens(engine), tokens(engine)], (engine.spec.layers - 1) * (TOKENS - 1)
        assert engine.spec.layers == 6
        ended = [number for number, done in gone if number]
        assert len(gone) > 1.8 * between  # all but where a choice ties
        assert all(done for _, done in gone)
        if budget == "100%":  # at first it is not known where experts lie
            assert len(ended) > between
            stats = [step.stats for step in engine.stream(PROMPT, SamplingConfig(max_new_tokens=TOKENS))][1:]
            assert all(0 < step.compute_s < step.product_s <= step.wall_s for step in stats)
        monkeypatch.setattr(DecodeStep, "_prepared", lambda *given: None)
        gone.clear()
        assert [tokens(engine), tokens(engine)] == found
        assert not gone


def test_nobody_is_pinned_when_a_layer_goes_on(all_ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pin held back must be evicted before the next layer begins what is resident."""
    go_on, pins = DecoderLayer.go_on, []

    with Engine(settings(all_ours, memory_budget="20%")) as engine:

        def watched(self: DecoderLayer, *given: Any) -> Any:
            pins.append(dict(engine.cache._pins))
            return go_on(self, *given)

        monkeypatch.setattr(DecoderLayer, "go_on", watched)
        tokens(engine)
    assert pins
    assert not any(pins)


def test_what_is_dropped_before_its_end_is_computed_again(
    all_ours: str, gone: Gone, monkeypatch: pytest.MonkeyPatch
) -> None:
    expire = Prefetcher.expire

    def dropping(self: Prefetcher, *given: Any, **named: Any) -> None:
        kernels.drop_begun_experts()
        expire(self, *given, **named)

    with Engine(settings(all_ours, memory_budget="100%")) as engine:
        wanted = tokens(engine)
        gone.clear()
        monkeypatch.setattr(Prefetcher, "expire", dropping)
        assert tokens(engine) == wanted
    assert any(number for number, _ in gone)
    assert all(done == (number == 0) for number, done in gone)


@pytest.mark.parametrize("where", ["_has_begun", "_look_ahead"])
def test_an_interrupt_around_that_call_leaves_the_threads_free(
    all_ours: str, gone: Gone, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    with Engine(settings(all_ours, memory_budget="100%")) as engine:
        tokens(engine)
        gone.clear()
        monkeypatch.setattr(DecodeStep if where == "_has_begun" else Pipeline, where, interrupted)
        monkeypatch.setattr(ExpertRuntime, "finish", lambda self: None)  # which drops it too
        with pytest.raises(KeyboardInterrupt):
            tokens(engine)
        assert len(gone) == (where == "_has_begun")
        assert threads_are_free()
        monkeypatch.undo()


def test_products_of_other_threads_are_timed_once_and_never_beyond_the_step(model: str) -> None:
    with Engine(settings(model)) as engine:
        steps = list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=TOKENS)))[1:]
    for step in steps:
        assert step.stats.product_s > 0
        assert step.stats.product_s + step.stats.stall_s <= step.stats.wall_s


class Silent:
    def on_event(self, event: Any) -> None:
        pass


def test_nothing_is_begun_while_somebody_listens(model: str, begun: list[list[ExpertKey]]) -> None:
    with Engine(settings(model)) as engine:
        stop = engine.listen(Silent())
        found = tokens(engine)
        assert not any(begun)
        stop()
        assert tokens(engine) == found
    assert any(begun)


class AfterAttention(BasePredictor):
    name = "after-attention"
    moment = Moment.AFTER_ATTENTION
    asks_routers = False

    def observe(self, step: RoutingStep) -> None:
        pass

    def predict(self, signals: Any) -> list[Prediction]:
        return [Prediction(signals.layer, tuple(range(signals.experts[signals.layer])), ())]


def test_nothing_is_begun_before_a_predictor_that_is_asked_ahead_of_the_choice(
    model: str, begun: list[list[ExpertKey]]
) -> None:
    with Engine(settings(model, predictor="none", prefetch="off")) as engine:
        wanted = tokens(engine)
    begun.clear()
    with Engine(settings(model)) as engine:
        engine.runtime.predictor = AfterAttention(1)
        assert tokens(engine) == wanted
    assert not any(begun)


def threads_are_free() -> bool:
    held: list[Weights] = [Weights(expert(HIDDEN, 64, "int8")[0])]
    code, end = begin(held, inputs(1, HIDDEN), 2)
    if code == 0:
        end()
    return code == 0


class Interrupting:
    def __init__(self, after: int) -> None:
        self.left = after

    def on_route(self, step: RoutingStep) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_an_interrupt_leaves_the_threads_free(model: str, begun: list[list[ExpertKey]]) -> None:
    with Engine(settings(model, memory_budget="100%")) as engine:
        engine.observers.append(Interrupting(engine.spec.layers * 3 + 1))
        with pytest.raises(KeyboardInterrupt):
            tokens(engine)
        assert begun[-1]
        assert threads_are_free()


@pytest.mark.parametrize("how", ["stream", "follow", "close"])
def test_an_interrupt_before_the_engine_has_the_choice_leaves_the_threads_free(
    model: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    after_attention, passes = ModelSignals.after_attention, [0]

    def interrupted(self: ModelSignals, layer: int, kernel: DecoderLayer) -> None:
        passes[0] += 1
        if passes[0] > 20 and kernel.residents is not None and kernel.residents.begun:
            raise KeyboardInterrupt
        after_attention(self, layer, kernel)

    with Engine(settings(model, memory_budget="100%")) as engine:
        monkeypatch.setattr(ModelSignals, "after_attention", interrupted)
        if how == "close":
            monkeypatch.setattr(ExpertRuntime, "finish", lambda self: None)
        run = partial(engine.follow, PROMPT * 6, 4) if how == "follow" else partial(tokens, engine)
        with pytest.raises(KeyboardInterrupt):
            run()
        if how == "close":
            assert not threads_are_free()
            engine.close()
        assert threads_are_free()


def test_somebody_who_listens_in_the_middle_of_a_token_changes_nothing(
    model: str, begun: list[list[ExpertKey]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(settings(model)) as engine:
        wanted = tokens(engine)
        begun.clear()
        listens = Listening(engine)
        engine.observers.append(listens)
        serve = engine.pipeline._serve

        def alone(*given: Any) -> None:
            assert threads_are_free()  # nobody computes in a slot that others may get
            serve(*given)

        monkeypatch.setattr(engine.pipeline, "_serve", alone)
        assert tokens(engine) == wanted
        assert any(begun)
        assert listens.times > 10
        assert threads_are_free()


class Listening:
    """An observer who begins to listen, or ends that, whenever a layer is told."""

    def __init__(self, engine: Engine) -> None:
        self.times, self._engine = 0, engine
        self._stop: Callable[[], None] | None = None

    def on_route(self, step: RoutingStep) -> None:
        self.times += 1
        if self._stop is None:
            self._stop = self._engine.listen(Silent())
        else:
            self._stop()
            self._stop = None


def test_layers_of_two_sizes_are_told_apart(model: str) -> None:
    where, layouts = np.full((4, 64), -1, np.int32), {}
    with Engine(settings(model)) as engine:
        layers = engine.layers.layers
        layout = engine.checkpoint.layout_of(ExpertKey(0, 0))
        other = replace(layout, nbytes=layout.nbytes + 4096)
        layouts = {layer.number: other if layer.number else layout for layer in layers}
        engine.layers.watch(where, 8, lambda key: layouts[key.layer])
        tables = [there for layer in layers if (there := layer.kernel.residents) is not None]
        assert len(tables) == len(layers)
        tables[0].tell(3, 1234)
        shown = [int(table._experts[3]) for table in tables]
    assert shown == [1234] + [0] * (len(shown) - 1)
    assert len(shown) > 1


def test_products_of_others_are_counted_once_and_no_longer_than_it_took() -> None:
    clock = Clock()
    clock.timed(lambda: sleep(0.01))
    assert clock.ns >= 10e6
    before, since = clock.ns, perf_counter_ns()
    sleep(0.02)
    counted = clock.ended(since, lambda: Ended(15_000_000))
    assert counted * 1e9 == pytest.approx(clock.ns - before, abs=2)
    assert 15e6 <= clock.ns - before <= clock.now - since - 5e6
    before, since = clock.ns, perf_counter_ns()
    experts_s = clock.ended(since, lambda: sleep(0.02) or Ended(0, beyond=3_000_000, other=5_000_000))
    assert experts_s * 1e9 == pytest.approx(clock.ns - before - 3e6, abs=2)
    assert clock.now - since - 6e6 <= clock.ns - before <= clock.now - since - 5e6
    before, since = clock.ns, perf_counter_ns()
    clock.ended(since, lambda: Ended(10**12))
    assert 0 <= clock.ns - before <= clock.now - since


def test_own_work_beside_a_read_is_neither_the_products_nor_the_wait() -> None:
    clock, began = Clock(), perf_counter_ns()
    clock.timed(lambda: sleep(0.01))
    clock.read_beside(began - 5_000_000, clock.now + 7_000_000, 4_000_000)
    assert clock.beside_ns == 8_000_000 + clock.now - began - clock.ns
    before = clock.beside_ns
    clock.forget()
    clock.read_beside(began, clock.now, 0)
    assert clock.beside_ns - before == clock.now - began


def test_work_beside_reads_is_less_than_the_token_even_in_waves(model: str) -> None:
    with Engine(settings(model, memory_budget="12%", predictor="none", prefetch="off")) as engine:
        steps = list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=TOKENS)))[1:]
    for step in steps:
        parts = step.stats.product_s, step.stats.stall_s, step.stats.beside_s
        assert all(part >= 0 for part in parts)
        assert sum(parts) <= step.stats.wall_s
