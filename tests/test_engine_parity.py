"""The contract: tokens and logits do not depend on budget, predictor, policy, store, readers or what else is held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.pack import pack
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.predictors import PREDICTORS
from foregate.predictors.base import BasePredictor
from foregate.testing.tiny import FAMILIES, REQUIRED, build
from foregate.types import Moment, Prediction, RoutingStep

LONG = [5 + (7 * i) % 240 for i in range(24)]
SHORT = LONG[:6]
"""Below GATHER_TOKENS: the prefill takes the other order of accumulation."""

TOLERANCE = 2e-5
"""Largest difference of a logit from stock transformers with eager experts, in float32 at logits of about 4."""

Result = tuple[torch.Tensor, torch.Tensor, list[int], list[int]]
Tiny = Callable[[str], Path]


def run(path: Path, budget: str, **settings: object) -> Result:
    """Logits of both prompts and the greedy tokens after them, and the engine's own integrity check."""
    with Engine(RunConfig(model=str(path), memory_budget=budget, **settings)) as engine:  # type: ignore[arg-type]
        logits = [engine.logits(ids).clone() for ids in (LONG, SHORT)]
        tokens = [[s.token_id for s in engine.stream(ids, SamplingConfig(max_new_tokens=8))] for ids in (LONG, SHORT)]
        engine.cache.check_integrity(idle=True)
        assert engine.pool.peak_bytes <= engine.plan.budget_bytes
        return logits[0], logits[1], tokens[0], tokens[1]


def same(one: Result, other: Result) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2:] == other[2:]


def minimum(path: Path) -> str:
    return str(open_checkpoint(path).spec.expert_slot_bytes)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact_and_equals_transformers(family: str, tiny: Tiny) -> None:
    path = tiny(family)
    full = run(path, "100%", predictor="none")
    assert same(run(path, "25%", predictor="next-gate", lookahead=2), full)
    assert same(run(path, minimum(path), predictor="none", reader_threads=1), full)
    stock = AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager").eval()
    with torch.no_grad():
        wanted = stock(torch.tensor([LONG])).logits[0]
    assert (full[0] - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", REQUIRED)
def test_packed_store_gives_the_same_bits(family: str, tiny: Tiny, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    pack(tiny(family), packed)
    assert same(run(packed, "30%", predictor="stale-gate"), run(tiny(family), "50%", predictor="none"))


@pytest.mark.parametrize("predictor", ["none", "stale-gate", "next-gate", "oracle", "random"])
@pytest.mark.parametrize("budget", ["100%", "50%", "25%", "13%"])
def test_no_predictor_or_budget_changes_a_bit(predictor: str, budget: str, tiny: Tiny) -> None:
    path = tiny("qwen2_moe")
    prefetch = "auto" if predictor == "none" else "4"
    assert same(run(path, budget, predictor=predictor, prefetch=prefetch), run(path, "100%", predictor="none"))


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_policy": "lfu"},
        {"cache_policy": "lfru"},
        {"cache_policy": "echo"},
        {"cache_policy": "lru"},
        {"reader_threads": 1},
        {"reader_threads": 0, "predictor": "none", "prefetch": "off"},
        {"reader_threads": 4},
        {"prefetch": "off"},
        {"lookahead": 2},
    ],
    ids=str,
)
def test_no_setting_changes_a_bit(settings: dict[str, object], tiny: Tiny) -> None:
    path = tiny("qwen3_moe")
    assert same(run(path, "25%", **settings), run(path, "100%", predictor="none"))


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_bfloat16_is_exact_too(family: str, tmp_path: Path) -> None:
    path = build(family, tmp_path / "bf16", dtype="bfloat16")
    assert same(run(path, "25%"), run(path, "100%", predictor="none"))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_observer_that_changes_what_it_is_told_changes_no_token(family: str, tiny: Tiny) -> None:
    class Spoiler:
        def on_route(self, step: RoutingStep) -> None:
            step.experts[:] = step.experts[:, ::-1].copy()
            step.weights[:] /= 3

    with Engine(RunConfig(model=str(tiny(family)), memory_budget="100%", predictor="none")) as engine:
        sampling = SamplingConfig(max_new_tokens=8)
        alone = [s.token_id for s in engine.stream(LONG, sampling)]
        logits = engine.logits(LONG).clone()
        engine.observers.append(Spoiler())
        assert [s.token_id for s in engine.stream(LONG, sampling)] == alone
        assert torch.equal(engine.logits(LONG), logits)


def test_a_second_prompt_on_a_warm_engine_is_not_changed_by_the_first(tiny: Tiny) -> None:
    path = tiny("mixtral")
    with Engine(RunConfig(model=str(path), memory_budget="40%")) as engine:
        sampling = SamplingConfig(max_new_tokens=6)
        first = [s.token_id for s in engine.stream(SHORT, sampling)]
        [s.token_id for s in engine.stream(LONG, sampling)]
        assert [s.token_id for s in engine.stream(SHORT, sampling)] == first


def test_an_abandoned_generation_leaves_nothing_behind(tiny: Tiny) -> None:
    with Engine(RunConfig(model=str(tiny("olmoe")), memory_budget="25%", prefetch="4")) as engine:
        stream = engine.stream(LONG, SamplingConfig(max_new_tokens=30))
        for _ in range(3):
            next(stream)
        stream.close()
        engine.cache.check_integrity(idle=True)
        assert engine.prefetcher.pending == 0


class Rubbish(BasePredictor):
    """A predictor as bad as they come: wrong layers, wrong types, endless lists."""

    name = "rubbish"

    calls = 0

    def predict(self, signals: object) -> list[Prediction]:
        self.calls += 1
        if self.calls == 9:
            raise RuntimeError("no idea")
        nonsense = (1.5, None, "x", -3, 10**9, float("nan"), *range(64))
        # The layer that is being served is among them: its missing experts must not be staged under its feet.
        return [Prediction(layer, nonsense, ()) for layer in (-1, 0, 1, 2, 3, 99)]  # type: ignore[arg-type]


@pytest.mark.parametrize("moment", Moment)
def test_a_predictor_that_talks_rubbish_and_then_fails_changes_nothing(
    moment: Moment, tiny: Tiny, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rubbish, "moment", moment)
    if "rubbish" not in PREDICTORS.names:
        PREDICTORS.register("rubbish", f"{__name__}:Rubbish")
    path = tiny("qwen2_moe")
    assert same(run(path, "25%", predictor="rubbish", prefetch="4"), run(path, "100%", predictor="none"))
    assert "no idea" in caplog.text
