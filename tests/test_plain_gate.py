"""A router's matrix speaks for the router only where it has shown that it chooses alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.engine.plain_gate import ENOUGH, PlainGate, order
from foregate.testing.tiny import FAMILIES
from foregate.types import Phase, RoutingStep

PROMPT = [5 + (7 * i) % 240 for i in range(20)]
E, D, K = 8, 16, 2


def inputs(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed))


def chosen(router: nn.Linear, x: Tensor, shift: Tensor | None = None) -> Any:
    logits = router(x) if shift is None else router(x) + shift
    return logits.topk(K).indices.numpy()


@torch.no_grad()
def test_a_plain_router_is_trusted_after_enough_tokens_and_not_before() -> None:
    router = nn.Linear(D, E, bias=True)
    gate, x = PlainGate(router, E), inputs(ENOUGH)
    gate.see(x[:-1], chosen(router, x[:-1]))
    assert gate.open
    assert not gate.trusted
    gate.see(x[-1:], chosen(router, x[-1:]))
    assert gate.trusted
    assert not gate.open
    torch.testing.assert_close(gate.logits(x[:1]), router(x[:1])[0])


@torch.no_grad()
def test_a_router_that_does_more_than_its_matrix_is_never_trusted() -> None:
    router = nn.Linear(D, E, bias=False)
    gate, x = PlainGate(router, E), inputs(64)
    gate.see(x, chosen(router, x, shift=torch.linspace(0, 2, E)))
    assert not gate.trusted
    gate.see(x, chosen(router, x))
    assert not gate.open
    assert not gate.trusted
    buffered = nn.Linear(D, E)
    buffered.register_buffer("correction", torch.zeros(E))
    for strange in (None, buffered, nn.Sequential(nn.Linear(D, E)), nn.Linear(D, E + 1)):
        assert not PlainGate(strange, E).open


def test_ties_at_the_last_place_fall_as_the_router_lets_them_fall() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        logits = torch.from_numpy(rng.integers(0, 4, 32).astype(np.float32)).bfloat16()
        ranked, scores = order(logits, 4)
        assert set(ranked[:4].tolist()) == set(logits.topk(4).indices.tolist())
        assert sorted(ranked.tolist()) == list(range(32))
        assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_the_fast_order_is_that_of_the_module(family: str, tiny: Callable[[str], Path]) -> None:
    if family not in FAMILIES:
        pytest.skip(f"no tiny {family}")
    with Engine(RunConfig(model=str(tiny(family)), memory_budget="100%", predictor="none")) as engine:
        signals, compared = engine.signals, []

        class Compare:
            def on_route(self, step: RoutingStep) -> None:
                gate = signals._plain[step.layer]
                if step.phase is Phase.DECODE and gate.trusted:
                    signals.layer = step.layer
                    fast, _ = signals.rank(step.layer, "router_input")
                    gate.trusted = False
                    slow, _ = signals.rank(step.layer, "router_input")
                    gate.trusted = True
                    compared.append(set(fast[: signals.top_k].tolist()) == set(slow[: signals.top_k].tolist()))

        engine.observers.append(Compare())
        list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=5)))
    assert all(compared)
    assert bool(compared) == (family in ("qwen3_moe", "mixtral", "gpt_oss"))
