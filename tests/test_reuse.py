"""Advice for the eviction policy: from traces to a file, from the file to the policy, from the policy to victims."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foregate.analysis import eviction
from foregate.analysis.eviction import Pass, Passes, compare
from foregate.analysis.prompt import Shape
from foregate.bench.arms import standard_arms
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.errors import ConfigError, PredictorError
from foregate.experts.echo import FOLLOWING, PATIENCE, SCORE_BIAS, SCORE_WEIGHTS, Echo
from foregate.interfaces import Signals
from foregate.native import products
from foregate.predictors.file import Artifact, ModelIdentity, load, save
from foregate.predictors.reuse import PREFIX, Reuse
from foregate.testing.routing import FEATURES, made_trace
from foregate.training import loop, reuse
from foregate.training.dataset import TRAIN, Dataset
from foregate.training.replayed import again, policy_features
from foregate.training.run import Request, train
from foregate.training.view import Tensors, View
from foregate.types import ExpertKey
from test_echo import E, chosen, way  # noqa: F401
from test_predictors_engine import PROMPT, Early, Tiny, run
from test_training_learned import NoBar, Replayed
from test_training_run import Bar

QUICK = ("block=64", "batch=32", "epochs=2", "reuse_epochs=2", "width=8")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_trace(tmp_path_factory.mktemp("made") / "trace", prompts=60, seed=3)


@pytest.fixture(scope="module")
def data(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset([trace], tmp_path_factory.mktemp("scratch"), features=FEATURES)


# The policy


def test_advice_and_its_weights_take_the_place_of_bias_and_weights_until_more_is_seen(way: bool) -> None:  # noqa: F811
    rng, policy = np.random.default_rng(1), Echo()
    weights, advice = rng.standard_normal(5).astype(np.float32), rng.standard_normal(E).astype(np.float32)
    for _ in range(20):
        scores = rng.standard_normal((1, E)).astype(np.float32)
        policy.observe(0, chosen(scores), scores)
    plain, features = policy.worth(0), policy.features(0)
    policy.advise(0, advice, weights)
    logits = weights.astype(float) @ features + advice
    assert policy.worth(0) == pytest.approx(-np.log1p(np.exp(-logits)), abs=1e-4)
    policy.advise(0, np.full(E, SCORE_BIAS, np.float32), SCORE_WEIGHTS)
    assert policy.worth(0) == pytest.approx(plain, abs=1e-5)
    policy.advise(0, advice, weights)
    policy.observe(0, chosen(scores), scores)
    fresh = policy.worth(0)
    logits = SCORE_WEIGHTS.astype(float) @ policy.features(0) + SCORE_BIAS
    assert fresh == pytest.approx(-np.log1p(np.exp(-logits)), abs=1e-4)


def test_the_victim_is_what_advice_calls_useless(way: bool) -> None:  # noqa: F811
    policy, scores = Echo(), np.zeros((1, E), np.float32)
    keys = [ExpertKey(0, expert) for expert in range(E)]
    policy.observe(0, np.array([[0, 1]]), scores)
    for key in keys:
        policy.touch(key)
    for useless in (5, 2):
        advice = np.full(E, 3.0, np.float32)
        advice[useless] = -3.0
        policy.advise(0, advice, SCORE_WEIGHTS)
        assert policy.victim(keys) == keys[useless]


def test_advice_without_scores_is_not_believed(way: bool) -> None:  # noqa: F811
    policy = Echo()
    policy.observe(0, np.array([[0, E - 1]]))
    before = policy.worth(0)
    assert not policy.wants_advice(0)
    policy.advise(0, np.linspace(-5, 5, E, dtype=np.float32), SCORE_WEIGHTS)
    assert (policy.worth(0) == before).all()
    assert not policy.takes_advice()


def test_advice_that_is_no_advice_is_refused() -> None:
    policy, scores = Echo(), np.zeros((1, E), np.float32)
    policy.observe(0, chosen(scores), scores)
    before, good = policy.worth(0), np.zeros(E, np.float32)
    with pytest.raises(ConfigError, match="on 8 experts of MoE layer 0"):
        policy.advise(0, good[:-1], SCORE_WEIGHTS)
    with pytest.raises(ConfigError, match=r"by \(4,\) on"):
        policy.advise(0, good, SCORE_WEIGHTS[:4])
    for bad in (np.nan, np.inf):
        with pytest.raises(ConfigError, match="not finite"):
            policy.advise(0, np.append(good[:-1], np.float32(bad)), SCORE_WEIGHTS)
        with pytest.raises(ConfigError, match="not finite"):
            policy.advise(0, good, np.append(SCORE_WEIGHTS[:-1], np.float32(bad)))
    assert (policy.worth(0) == before).all()


# What is learned


def test_how_soon_an_expert_is_needed_again_is_counted_within_the_prompt(data: Dataset) -> None:
    block = next(data.blocks(TRAIN, 200))
    found = again(block, data.experts)
    ends = [*np.flatnonzero(block.first)[1:], block.tokens]
    end = np.repeat(ends, np.diff([0, *ends]))
    seen = 0
    for token in range(block.tokens):
        if end[token] - 1 - token < FOLLOWING:
            assert np.isnan(found[token]).all()
            continue
        for layer in range(data.layers):
            for expert in range(data.experts):
                uses = [t for t in range(token + 1, end[token]) if expert in block.experts[t, layer]]
                expected = math.exp(-(uses[0] - token - 1) / PATIENCE) if uses else 0.0
                assert found[token, layer, expert] == pytest.approx(expected, abs=1e-6)
                seen += bool(uses)
    assert seen > 1000


def test_features_are_those_of_the_policy_along_the_block(data: Dataset) -> None:
    block, policy = next(data.blocks(TRAIN, 40)), Echo()
    found = policy_features(block, data.model.experts_per_layer)
    assert block.scores is not None
    for token in range(block.tokens):
        for layer in range(data.layers):
            policy.observe(layer, block.experts[token, layer][None], block.scores[token, layer][None])
            np.testing.assert_allclose(found[token, layer].T, policy.features(layer), atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["numpy", "compiled"])
def test_what_torch_trained_is_served_with_the_same_numbers(
    compiled: bool, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 up to rounding; with weights in int8 within a twentieth of the spread."""
    if not compiled:
        monkeypatch.setattr(products, "_linear", lambda: None)
    torch.manual_seed(1)
    made = reuse.Reuse(data, reuse.ReuseOptions(width=16))
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.3 * torch.randn_like(value))
    arrays = {PREFIX + name: value for name, value in made.arrays().items()}
    served = Reuse(artifact(data, arrays))
    prompt = next(p for p in data.prompts(TRAIN) if p.tokens > 8)
    block = next(data.blocks(TRAIN, 10**6, FEATURES))
    tensors = Tensors(block, data.model.experts_per_layer, data.score_kind, replay=True)
    start = next(
        i for i in np.flatnonzero(block.first) if (block.token_id[i : i + prompt.tokens] == prompt.token_id).all()
    )
    with torch.inference_mode():
        view = View(tensors, torch.arange(start, start + prompt.tokens))
        scores = made.scores(view, torch.arange(data.layers))[:, :, 0].numpy()
        features = view.policy.numpy()
    signals: Any = Replayed(prompt)
    rounding = 0.05 * float(scores.std()) if compiled else 1e-4
    for token in range(prompt.tokens):
        for layer in range(data.layers):
            signals.position, signals.layer = token, layer
            advice, own = served(signals)
            np.testing.assert_allclose(features[token, layer] @ own + advice, scores[token, layer], atol=rounding)


def artifact(data: Dataset, arrays: dict[str, Any]) -> Artifact:
    model = data.model
    identity = ModelIdentity("made", model.fingerprint, model.experts_per_layer, model.width, model.hidden_size)
    return Artifact("fusion", identity, 1, arrays)


def test_an_array_of_another_shape_is_refused(data: Dataset) -> None:
    made = reuse.Reuse(data, reuse.ReuseOptions(width=16))
    arrays = {PREFIX + name: value for name, value in made.arrays().items()}
    for name in arrays:
        with pytest.raises(PredictorError, match=r"array 'reuse_.*' has shape"):
            Reuse(artifact(data, {**arrays, name: arrays[name][..., :-1]}))
        if name != f"{PREFIX}own":
            with pytest.raises(PredictorError, match="missing"):
                Reuse(artifact(data, {other: value for other, value in arrays.items() if other != name}))


def test_training_learns_more_than_the_policy_knows(trace: Path, data: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = loop.judge(reuse.Reuse(data, reuse.ReuseOptions()), data, "validation", reuse.ReuseOptions())
    given = ("block=256", "batch=64", "epochs=1", "reuse_epochs=6")
    made = train(Request("fusion", (trace,), tmp_path / "p.safetensors", given), NoBar())
    assert made.metrics["reuse"]["loss"] < plain["loss"] - 0.01
    assert made.metrics["reuse"]["next_token"] > plain["next_token"]
    assert {name for name in made.arrays if name.startswith(PREFIX)} == {
        f"{PREFIX}{name}" for name in ("own", "inward_weight", "inward_bias", "outward_weight", "outward_bias")
    }


def test_a_file_without_advice_is_trained_on_request(trace: Path, tmp_path: Path) -> None:
    made = train(Request("fusion", (trace,), tmp_path / "p.safetensors", (*QUICK[:3], "reuse_epochs=0")), NoBar())
    assert not any(name.startswith(PREFIX) for name in made.arrays)
    assert "reuse" not in made.metrics
    with pytest.raises(ConfigError, match="reuse_epochs=-1 must be at least 0"):
        train(Request("fusion", (trace,), tmp_path / "q.safetensors", ("reuse_epochs=-1",)), NoBar())


@pytest.mark.parametrize("left", [2, 7])
def test_killed_in_the_second_training_and_continued_is_the_same_as_never_killed(
    left: int, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    whole, out = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    taken, step = [0], loop.Training._step

    def counting(self: Any, *arguments: Any) -> float:
        taken[0] += 1
        return step(self, *arguments)

    monkeypatch.setattr(loop.Training, "_step", counting)
    train(Request("fusion", (trace,), whole, QUICK, threads=1), Bar())
    last = taken[0]

    def dying(self: Any, *arguments: Any) -> float:
        if taken[0] == 2 * last - left:
            raise KeyboardInterrupt
        return counting(self, *arguments)

    monkeypatch.setattr(loop.Training, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train(Request("fusion", (trace,), out, QUICK, threads=1), Bar())
    monkeypatch.setattr(loop.Training, "_step", counting)
    before = taken[0]
    train(Request("fusion", (trace,), out, QUICK, threads=1), Bar())
    assert taken[0] - before < last / 2, "the first training was done again"
    assert out.read_bytes() == whole.read_bytes()
    assert out.with_suffix(".curve.jsonl").read_text() == whole.with_suffix(".curve.jsonl").read_text()


# In the engine


class Advising(Early):
    """Advises, and notes it."""

    def __init__(self, says: str = "") -> None:
        super().__init__()
        self._says = says

    def advise(self, signals: Signals) -> tuple[Any, Any] | None:
        self.heard.append(("advise", signals.layer))
        experts = signals.experts[signals.layer]
        if self._says == "raises":
            raise ValueError("no idea")
        if self._says == "short":
            return np.zeros(experts - 1, np.float32), SCORE_WEIGHTS
        if self._says == "huge":
            return np.full(experts, -1e300), SCORE_WEIGHTS
        if self._says == "words":
            return np.array(["soon"] * experts, object), SCORE_WEIGHTS
        assert len(signals.hidden("residual")) > 0
        return np.arange(experts, dtype=np.float32), SCORE_WEIGHTS


def advised(tiny: Tiny, predictor: Advising, **settings: Any) -> tuple[list[int], Engine, dict[str, Any]]:
    given: dict[str, Any] = {"model": str(tiny("qwen3_moe")), "memory_budget": "40%", **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foregate.predictors.choice.make_predictor", lambda *_: predictor)
        with Engine(RunConfig(predictor="next-gate", **given)) as engine:
            tokens = [step.token_id for step in engine.stream(PROMPT, SamplingConfig(max_new_tokens=6))]
            assert engine.report is not None
            return tokens, engine, engine.report.as_dict()


@pytest.mark.parametrize("prefetch", ["2", "off"])
def test_advice_is_asked_once_a_layer_before_the_choice_is_told_and_changes_no_token(tiny: Tiny, prefetch: str) -> None:
    predictor = Advising()
    tokens, engine, report = advised(tiny, predictor, prefetch=prefetch)
    assert tokens == run(str(tiny("qwen3_moe")), predictor="none", memory_budget="100%")[0]
    asked = [one for one in predictor.heard if one[0] in ("advise", "told")]
    layers = engine.spec.layers
    assert asked == [(what, layer) for layer in range(layers) for what in ("advise", "told")] * 5
    assert report["eviction_advised"]


def test_advice_reaches_the_policy_where_the_predicted_experts_run(tiny: Tiny) -> None:
    predictor = Advising()
    _, _, report = advised(tiny, predictor, lossy="execute-predicted")
    assert ("advise", 1) in predictor.heard
    assert report["eviction_advised"]


def test_advice_changes_what_is_evicted(tiny: Tiny) -> None:
    class Sided(Advising):
        def __init__(self, sign: int) -> None:
            super().__init__()
            self._sign = sign

        def advise(self, signals: Signals) -> tuple[Any, Any] | None:
            said = super().advise(signals)
            assert said is not None
            return self._sign * (said[0] - said[0].mean()), np.zeros(5, np.float32)

    low, high = (advised(tiny, Sided(sign), prefetch="off")[1].cache.resident for sign in (-1, 1))
    assert np.mean([key.expert for key in low]) < np.mean([key.expert for key in high]) - 0.5


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("prefetch", ["2", "off"])
@pytest.mark.parametrize("says", ["raises", "short", "huge", "words"])
def test_an_adviser_that_breaks_is_asked_no_more_and_changes_no_token(
    tiny: Tiny, says: str, prefetch: str, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = Advising(says)
    tokens, engine, report = advised(tiny, predictor, prefetch=prefetch)
    assert tokens == run(str(tiny("qwen3_moe")), predictor="none", memory_budget="100%")[0]
    assert [what for what, _ in predictor.heard].count("advise") == 1
    assert not report["eviction_advised"]
    assert "failed" in report["eviction_advice_fault"]
    assert report["eviction_advice_fault"] in caplog.text
    assert "failed" not in engine.prefetcher.controller.off_reason, "its predictions are still as good"


def test_other_policies_and_a_budget_for_all_take_no_advice(tiny: Tiny) -> None:
    for settings in ({"cache_policy": "lru"}, {"memory_budget": "100%"}):
        predictor = Advising()
        _, _, report = advised(tiny, predictor, **settings)
        assert "advise" not in {what for what, _ in predictor.heard}
        assert not report["eviction_advised"]


# In benches


class Knowing:
    """Advice by what a cyclic routing needs next."""

    def on(self, layer: int, residual: Any) -> tuple[Any, Any]:
        needed = np.arange(8) // 2 == (int(residual[0]) + 1) % 4
        return np.where(needed, 4.0, -0.5).astype(np.float32), 0 * SCORE_WEIGHTS


def test_advice_that_knows_the_next_token_closes_more_of_the_gap() -> None:
    rng, passes = np.random.default_rng(0), Passes()
    pair = 0
    for _ in range(300):
        follows = int(rng.integers(0, 4))
        residual = np.full((3, 1), (follows - 1) % 4, np.float32)
        passes.append(Pass(np.array([[[2 * pair, 2 * pair + 1]] * 3]), np.zeros((1, 3, 8), np.float32), residual))
        pair = follows
    known: Any = Knowing()
    rows = compare("arm", [passes], Shape((8, 8, 8), (2, 2, 2)), 0.5, cold=False, reuse=known)
    closed = {row["policy"]: row["gap_closed"] for row in rows}
    assert closed["echo (advised)"] > closed["echo"] + 0.2


def test_a_file_with_advice_has_an_arm_without_reads_ahead_and_every_run_a_control(
    data: Dataset, tmp_path: Path
) -> None:
    made = reuse.Reuse(data, reuse.ReuseOptions(width=16))
    path = tmp_path / "wise.safetensors"
    save(path, artifact(data, {PREFIX + name: value for name, value in made.arrays().items()}))
    assert load(path).method == "fusion"
    arms = {arm.name: arm.settings for arm in standard_arms([str(path), "next-gate"], None, "echo")}
    assert [name for name in arms if name.startswith("cache+advice:")] == ["cache+advice:wise"]
    assert arms["cache+advice:wise"]["prefetch"] == "off"
    assert arms["control:echo"] == arms["cache-only:echo"]
    assert not [arm.name for arm in standard_arms([str(path)], None, "lru") if arm.name.startswith("cache+advice:")]


def test_advice_of_another_model_or_without_a_use_is_refused(
    data: Dataset, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = reuse.Reuse(data, reuse.ReuseOptions(width=16))
    mine = artifact(data, {PREFIX + name: value for name, value in made.arrays().items()})
    path = tmp_path / "other.safetensors"
    save(path, replace(mine, model=replace(mine.model, fingerprint="f" * 64)))
    with pytest.raises(PredictorError, match="made for made"):
        eviction._main([str(trace), "--predictor", str(path)])
    with pytest.raises(SystemExit):
        eviction._main([str(trace), "--predictor", str(path), "--fit"])
    assert "--fit knows nothing of --predictor" in capsys.readouterr().err
    with pytest.raises(PredictorError, match="a residual of 3 numbers"):
        Reuse(mine).on(0, np.zeros(3, np.float32))
