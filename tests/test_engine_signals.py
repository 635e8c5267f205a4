"""Signals: routers asked ahead say what they will say, hooks leave no trace, and doubt switches speculation off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
