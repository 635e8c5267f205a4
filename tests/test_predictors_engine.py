"""Whatever predicts, the tokens are the same; files of other models are refused; the true router knows its own mind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from foregate.checkpoint.locate import locate
from foregate.checkpoint.opening import open_checkpoint
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.errors import ConfigError, PredictorError
from foregate.experts.echo import Echo
from foregate.interfaces import Signals
from foregate.native import kernels
from foregate.predictors import PREDICTORS
from foregate.predictors.base import BasePredictor
from foregate.predictors.choice import beginning
from foregate.predictors.file import Artifact, ModelIdentity, save
from foregate.predictors.gate import NextGate
from foregate.testing.inflate import inflate
from foregate.testing.tiny import REQUIRED, build
from foregate.types import Phase, Prediction, RoutingStep

PROMPT = [5 + (7 * i) % 240 for i in range(20)]
Tiny = Callable[[str], Path]

DISTRUSTED = {"deepseek_v4"}
"""See ``test_engine_signals``."""


def identity(model: str) -> ModelIdentity:
    checkpoint = open_checkpoint(locate(model))
    spec = checkpoint.spec
    return ModelIdentity(model, checkpoint.fingerprint, spec.experts_per_layer, spec.top_k, spec.hidden_size)


def arrays(method: str, model: ModelIdentity) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """Random arrays of the right shapes: what a predictor says must not matter."""
    rng = np.random.default_rng(5)
    layers, experts, hidden = model.layers, max(model.experts), model.hidden_size

    def some(*shape: int) -> NDArray[Any]:
        return rng.random(shape, np.float32)

    return {
        "popularity": ({"popularity": some(layers, experts)}, {}),
        "markov": ({"transition": some(2, layers, experts, experts)}, {}),
        "eam": ({"library": some(6, layers, experts)}, {"scope": "token"}),
        "expert-map": ({"maps": some(6, layers, experts), "inputs": some(6, hidden)}, {"semantic_layers": 1}),
        "quasi-hidden": ({"experts": some(layers, experts, hidden), "rest": some(layers, hidden)}, {}),
    }.get(method)


def choice(method: str, model: str, directory: Path) -> str:
    """What ``--predictor`` takes: the name, or a file made here."""
    made = arrays(method, identity(model)) if PREDICTORS.load(method).needs_file else None
    if made is None:
        return method
    path = directory / f"{method}.safetensors"
    save(path, Artifact(method, identity(model), 1, *made))
    return str(path)


def run(model: str, **settings: Any) -> tuple[list[int], dict[str, Any]]:
    with Engine(RunConfig(model=model, **settings)) as engine:
        steps = list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=6)))
        assert engine.report is not None
        return [step.token_id for step in steps], engine.report.as_dict()


def servable(method: str) -> bool:
    kind = PREDICTORS.load(method)
    return not kind.needs_file or arrays(method, ModelIdentity("", "", (2,), 1, 1)) is not None


METHODS = [name for name in PREDICTORS.own_names if name != "none" and servable(name)]


@pytest.mark.parametrize(
    ("model", "methods"), [("qwen2_moe", METHODS), ("reference", ["quasi-hidden", "eam"])], ids=["tiny", "reference"]
)
def test_tokens_are_the_same_under_every_predictor(model: str, methods: list[str], tiny: Tiny, tmp_path: Path) -> None:
    path = model if model == "reference" else str(tiny(model))
    expected, _ = run(path, memory_budget="100%", predictor="none")
    for method in methods:
        text = choice(method, path, tmp_path)
        tokens, report = run(path, memory_budget="30%", predictor=text, prefetch="2")
        assert tokens == expected, method
        assert report["prefetch"]["issued"] > 0, method
        assert report["predictor"] == text


@pytest.mark.parametrize("family", [f for f in REQUIRED if f not in DISTRUSTED])
def test_fresh_gate_names_what_is_chosen_an_instant_later(family: str, tiny: Tiny) -> None:
    config = RunConfig(model=str(tiny(family)), memory_budget="50%", predictor="fresh-gate", prefetch="4")
    with Engine(config) as engine:
        said: dict[int, tuple[int, ...]] = {}
        right = []
        ask = engine.predictor.predict

        def listen(signals: Any) -> Any:
            predictions = ask(signals)
            said.update((prediction.layer, prediction.experts) for prediction in predictions)
            return predictions

        class Judge:
            def on_route(self, step: RoutingStep) -> None:
                if step.phase is Phase.DECODE:
                    chosen = set(step.experts[-1].tolist())
                    right.append(set(said.pop(step.layer)[: len(chosen)]) == chosen)

        engine.predictor.predict = listen  # type: ignore[method-assign]
        engine.observers.append(Judge())
        list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=5)))
    assert len(right) == 4 * engine.spec.layers
    assert all(right)


def test_a_file_of_another_model_is_refused_with_both_names(tiny: Tiny, tmp_path: Path) -> None:
    path = choice("popularity", str(tiny("qwen2_moe")), tmp_path)
    with pytest.raises(PredictorError, match=r"made for .*qwen2_moe.*not for .*qwen3_moe"):
        Engine(RunConfig(model=str(tiny("qwen3_moe")), predictor=path))


def test_a_file_of_the_original_serves_its_inflated_copy(tmp_path: Path) -> None:
    plain = build("qwen3_moe", tmp_path / "plain", dtype="bfloat16")
    large = inflate(plain, tmp_path / "large", hidden_factor=4)
    for method in ("quasi-hidden", "expert-map"):
        path = choice(method, str(plain), tmp_path)
        assert run(str(large), memory_budget="30%", predictor=path, prefetch="2")[1]["prefetch"]["issued"] > 0
        with pytest.raises(PredictorError, match="made for"):
            Engine(RunConfig(model=str(plain), predictor=choice(method, str(large), tmp_path)))


def test_a_file_of_an_unknown_method_and_one_that_reads_no_file_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = str(tiny("qwen3_moe"))
    for method, words in (("no-such", "unknown predictor 'no-such'"), ("next-gate", "reads no file")):
        path = tmp_path / f"{method}.safetensors"
        save(path, Artifact(method, identity(model), 1, {"x": np.zeros(1)}))
        with pytest.raises(ConfigError, match=words):
            Engine(RunConfig(model=model, predictor=str(path)))


class Early(BasePredictor):
    """Notes when it is asked what."""

    def __init__(self, breaks: str = "") -> None:
        super().__init__()
        self.heard: list[tuple[str, int]] = []
        self._breaks = breaks

    def observe(self, step: RoutingStep) -> None:
        if step.phase is Phase.DECODE:
            self.hear("told", step.layer)

    def begin(self, signals: Signals) -> Callable[[], Sequence[Prediction]]:
        layer = signals.layer
        self.hear("begin", layer)

        def end() -> Sequence[Prediction]:
            self.hear("end", layer)
            assert signals.layer == layer
            return [Prediction(layer + 1, (0, 1, 2), (3.0, 2.0, 1.0))] if layer + 1 < signals.layers else []

        return end

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        self.hear("predict", signals.layer)
        return []

    def hear(self, what: str, layer: int) -> None:
        self.heard.append((what, layer))
        if what == self._breaks:
            raise ValueError(f"broken at the {what}")


class Changed(Early):
    """Predicts something else than it would begin to."""

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        return super().predict(signals)


def heard(model: str, predictor: Any) -> tuple[list[int], str]:
    settings: dict[str, Any] = {"model": model, "memory_budget": "50%", "prefetch": "2"}
    with Engine(RunConfig(predictor="next-gate", **settings)) as engine:
        engine.runtime.predictor = predictor
        tokens = [step.token_id for step in engine.stream(PROMPT, SamplingConfig(max_new_tokens=6))]
        return tokens, engine.prefetcher.controller.off_reason


def test_a_predictor_that_can_begins_once_told_and_ends_before_the_next_layer(tiny: Tiny) -> None:
    model, early = str(tiny("qwen3_moe")), Early()
    tokens, reason = heard(model, early)
    assert (tokens, reason) == (run(model, predictor="none", memory_budget="50%")[0], "")
    layers = len(identity(model).experts)
    in_order = [(what, layer) for layer in range(layers) for what in ("told", "begin", "end")]
    assert early.heard == in_order * (len(early.heard) // len(in_order))
    assert len(early.heard) == 5 * len(in_order)


@pytest.mark.parametrize("breaks", ["begin", "end"])
def test_one_that_breaks_on_the_way_ends_speculation_and_changes_nothing(tiny: Tiny, breaks: str) -> None:
    model = str(tiny("qwen3_moe"))
    tokens, reason = heard(model, Early(breaks))
    assert tokens == run(model, predictor="none", memory_budget="50%")[0]
    assert reason.endswith(f"ValueError: broken at the {breaks}")


class Breaking:
    """An observer that breaks in a decode step."""

    def on_route(self, step: RoutingStep) -> None:
        if step.phase is Phase.DECODE and step.layer == 1:
            raise RuntimeError("an observer broke")


class Brittle(NextGate):
    """Breaks in what it need not return from, or once another thread computes for it."""

    def __init__(self, breaks: str) -> None:
        super().__init__(1)
        self._breaks = breaks

    def reset(self) -> None:
        self.come_to("reset")

    def observe(self, step: RoutingStep) -> None:
        self.come_to("observe")

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        return super().predict(signals)

    def begin(self, signals: Signals) -> Callable[[], Sequence[Prediction]]:
        end = signals.begin_best(signals.layer + 1, self.signal, None)
        self.come_to("begin")
        return lambda: [end()]

    def come_to(self, what: str) -> None:
        if what == self._breaks:
            raise ValueError(f"broken at the {what}")


@pytest.mark.parametrize("breaks", ["reset", "observe", "begin"])
def test_a_predictor_that_breaks_anywhere_ends_speculation_and_changes_nothing(tiny: Tiny, breaks: str) -> None:
    model = str(tiny("qwen3_moe"))
    tokens, reason = heard(model, Brittle(breaks))
    assert tokens == run(model, predictor="none", memory_budget="50%")[0]
    assert reason.endswith(f"ValueError: broken at the {breaks}")


Untyped: Any = Prediction
"""As a stranger may make it, who checks no types."""


class Rubbish(BasePredictor):
    """Tells what nobody can read, or hardly."""

    def __init__(self, told: Any) -> None:
        super().__init__()
        self._told = told

    def predict(self, signals: Signals) -> Any:
        return self._told(signals)


@pytest.mark.parametrize(
    "told",
    [
        lambda signals: None,
        lambda signals: [None],
        lambda signals: [Untyped(None, (0,), (1.0,))],
        lambda signals: [Untyped(1.5, (0,), (1.0,))],
        lambda signals: [Untyped(signals.layer + 1, None, ())],
        lambda signals: (1 / 0 for _ in range(1)),
    ],
)
def test_a_predictor_that_tells_rubbish_changes_nothing(tiny: Tiny, told: Any) -> None:
    model = str(tiny("qwen3_moe"))
    tokens, reason = heard(model, Rubbish(told))
    assert tokens == run(model, predictor="none", memory_budget="50%")[0]
    assert " failed: " in reason


def test_a_prediction_may_have_other_forms_than_tuples(tiny: Tiny) -> None:
    def told(signals: Signals) -> Any:
        at = np.int64(signals.layer + 1)
        yield Untyped(at, np.array([0, 1]), np.array([1.0, 0.5]))

    model = str(tiny("qwen3_moe"))
    assert heard(model, Rubbish(told)) == (run(model, predictor="none", memory_budget="50%")[0], "")


class Liar(BasePredictor):
    """Changes what it is told as soon as it is."""

    def observe(self, step: RoutingStep) -> None:
        step.experts[:] = 0
        step.weights[:] = 1

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        for name in ("pre_attention", "residual", "router_input"):
            signals.hidden(name)[:] = 0
        return []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_predictor_changes_does_not_reach_the_model(tmp_path: Path, dtype: str) -> None:
    model = str(build("qwen3_moe", tmp_path, dtype=dtype))
    assert heard(model, Liar()) == (run(model, predictor="none", memory_budget="50%")[0], "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_predictor_changes_does_not_reach_the_eviction_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    told: list[tuple[int, list[list[int]]]] = []
    observe = Echo.observe

    def noted(policy: Echo, layer: int, experts: NDArray[np.int64], scores: Any = None) -> None:
        told.append((layer, experts.tolist()))
        observe(policy, layer, experts, scores)

    monkeypatch.setattr(Echo, "observe", noted)
    model = str(build("qwen3_moe", tmp_path, dtype=dtype))
    with Engine(RunConfig(model=model, memory_budget="50%", prefetch="2", cache_policy="echo")) as engine:
        for predictor in (BasePredictor(), Liar()):
            engine.runtime.predictor = predictor
            list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=6)))
    half = len(told) // 2
    assert told[:half] == told[half:]
    assert len({str(experts) for _, experts in told}) > half // 2


@pytest.mark.parametrize("text_is_given", [False, True])
def test_a_pass_that_breaks_off_ends_what_has_begun(tiny: Tiny, text_is_given: bool) -> None:
    early, settings = Early(), {"memory_budget": "50%", "prefetch": "2"}
    with Engine(RunConfig(model=str(tiny("qwen3_moe")), predictor="next-gate", **settings)) as engine:
        engine.runtime.predictor = early
        engine.observers.append(Breaking())
        with pytest.raises(RuntimeError, match="an observer broke"):
            _ = engine.follow(PROMPT, 3) if text_is_given else list(engine.stream(PROMPT, SamplingConfig()))
        assert early.heard[-2:] == [("begin", 1), ("end", 1)]


def test_a_subclass_that_predicts_something_else_is_asked_for_that(tiny: Tiny) -> None:
    model, changed = str(tiny("qwen3_moe")), Changed()
    heard(model, changed)
    assert {what for what, _ in changed.heard} == {"told", "predict"}
    on_the_object: Any = Early()
    on_the_object.predict = lambda signals: []
    assert beginning(on_the_object) is None
    assert beginning(Early()) is not None
    assert beginning(BasePredictor()) is None


class Twice(NextGate):
    """Asks at once and by beginning."""

    def __init__(self, lookahead: int) -> None:
        super().__init__(lookahead)
        self.same: list[bool] = []

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        return super().predict(signals)

    def begin(self, signals: Signals) -> Callable[[], Sequence[Prediction]]:
        expected, end = super().predict(signals), super().begin(signals)

        def told() -> Sequence[Prediction]:
            given = end()
            self.same.append(given == expected)
            return given

        return told


@pytest.mark.parametrize("least", [0, 1 << 30])
@pytest.mark.parametrize("lookahead", [1, 2])
def test_routers_asked_beside_the_engine_say_what_they_say_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lookahead: int, least: int
) -> None:
    monkeypatch.setattr("foregate.predictors.gate.WORTH_BEGINNING", least)
    monkeypatch.setattr("foregate.engine.dense.SMALLEST", 1)
    model = str(build("qwen3_moe", tmp_path / "model", dtype="bfloat16", hidden_size=128, num_hidden_layers=4))
    settings: dict[str, Any] = {"model": model, "memory_budget": "50%", "prefetch": "2", "threads": 2}
    with Engine(RunConfig(predictor="next-gate", **settings)) as engine:
        twice = engine.runtime.predictor = Twice(lookahead)
        list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=6)))
        assert all(twice.same)
        assert len(twice.same) == 5 * engine.spec.layers
        if kernels.library() is not None:
            assert all(part.compiled is not None for part in engine.signals.parts)
