"""Signals: routers asked ahead say what they will say, hooks leave no trace, and doubt switches speculation off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.testing.tiny import FAMILIES
from foregate.types import Phase, RoutingStep

PROMPT = [5 + (7 * i) % 240 for i in range(20)]
Tiny = Callable[[str], Path]

DISTRUSTED = {"deepseek_v4"}
"""Its hash layers route by token id: their router wants the ids of all tokens, so it is not asked ahead."""


class FreshGate:
    """Control: asks each layer's own router on its own input; must name what the model chose."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.asked, self.right = engine, 0, 0

    def on_route(self, step: RoutingStep) -> None:
        if step.phase is Phase.PREFILL:
            return
        signals = self.engine.signals
        signals.layer = step.layer
        ranked, _ = signals.rank(step.layer, "router_input")
        chosen = set(step.experts[-1].tolist())
        self.asked += 1
        self.right += set(ranked[: len(chosen)].tolist()) == chosen


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in DISTRUSTED])
def test_fresh_gate_reads_one_hundred_percent(family: str, tiny: Tiny) -> None:
    with Engine(RunConfig(model=str(tiny(family)), memory_budget="100%", predictor="none")) as engine:
        gate = FreshGate(engine)
        engine.observers.append(gate)
        list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=5)))
    assert engine.signals.distrust == ""
    assert gate.asked == gate.right > 0


class Scores:
    """Compares what the policy is told with what the routers chose."""

    def __init__(self, engine: Engine) -> None:
        self.told, self.silent, self.wrong = 0, 0, 0
        self._inside: Any = engine.cache.policy

    def observe(self, layer: int, experts: Any, scores: Any = None) -> None:
        self._inside.observe(layer, experts, scores)
        self.told += 1
        if scores is None:
            self.silent += 1
            return
        assert len(scores) == len(experts)
        best = np.take_along_axis(scores, experts, axis=1).mean()
        self.wrong += not best > scores.mean()


BIASED = {"inkling_text", "zaya"}
"""Families whose routers choose by more than the scores that they give."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_policy_is_told_the_routers_own_scores_or_none(family: str, tiny: Tiny) -> None:
    config = RunConfig(model=str(tiny(family)), memory_budget="50%", predictor="none", cache_policy="echo")
    with Engine(config) as engine:
        scores = Scores(engine)
        engine.runtime._informed = scores  # type: ignore[assignment]
        list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=3)))
    assert scores.told > scores.silent
    if family not in BIASED:
        assert scores.silent == scores.wrong == 0
    assert not any(module._forward_hooks for module in engine.model.modules())


@pytest.mark.parametrize("family", sorted(DISTRUSTED))
def test_a_router_that_cannot_be_asked_switches_speculation_off(
    family: str, tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    with Engine(RunConfig(model=str(tiny(family)), memory_budget="50%")) as engine:
        list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=5)))
        assert engine.report is not None
        report = engine.report.as_dict()
    assert "speculation is off" in caplog.text
    assert family in report["controller"]["reason"]
    assert not report["controller"]["enabled"]


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_closing_takes_every_hook_off(tiny: Tiny) -> None:
    engine = Engine(RunConfig(model=str(tiny("qwen2_moe"))))
    during = hooks(engine.model)
    list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=2)))
    assert 0 < hooks(engine.model) < during + engine.spec.layers + 1
    engine.close()
    assert hooks(engine.model) == 0
