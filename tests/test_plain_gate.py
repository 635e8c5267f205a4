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
from foregate.native import kernels
from foregate.testing.tiny import FAMILIES, build
from foregate.types import Moment, Phase, Prediction, RoutingStep

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
@pytest.mark.parametrize(
    ("choice", "trusted"),
    [
        ((0, 1), True),
        ((0, 2), True),
        ((0, 3), False),
        ((1, 2), False),
        ((0, 0), False),
        ((0, -1), False),
        ((0, E), False),
    ],
)
def test_what_rounding_decides_is_no_contradiction(choice: tuple[int, int], trusted: bool) -> None:
    router = nn.Linear(D, E, bias=False, dtype=torch.bfloat16)
    router.weight[:, 0] = torch.tensor([4, 3, 3 - 1 / 64, 2.8, 0, 0, 0, 0])  # steps of 1/64 from 2 to 4
    x = torch.zeros(ENOUGH, D, dtype=torch.bfloat16)
    x[:, 0] = 1
    gate = PlainGate(router, E)
    gate.see(x, np.tile(np.array([choice]), (ENOUGH, 1)))
    assert gate.trusted == (choice in ((0, 1), (0, 2)))


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


@pytest.mark.skipif(kernels.library() is None, reason="the kernels are not built")
@pytest.mark.parametrize(("experts", "width"), [(5, 16), (32, 2048), (128, 192), (1, 32), (300, 48), (7, 33)])
@torch.no_grad()
def test_one_call_ranks_as_norm_product_and_order_do(experts: int, width: int) -> None:
    generator = torch.Generator().manual_seed(experts)
    gate = torch.randn(experts, width, generator=generator).bfloat16()
    norm = (torch.randn(width, generator=generator).bfloat16(), 1e-6) if width % 16 == 0 else None
    top_k = min(4, experts)
    plain, ranker = kernels.matrix(gate, None), kernels.Ranker(gate, norm, top_k)
    decided = 0
    for row in torch.randn(100, 1, width, generator=generator).bfloat16():
        x = row if norm is None else kernels.rms_norm(row, *norm)
        experts_there, scores_there = order(kernels.linear(plain, x, experts)[0], top_k)
        found = ranker(row)
        if found is not None:
            decided += 1
            np.testing.assert_array_equal(found[0], experts_there)
            np.testing.assert_array_equal(found[1].view(np.int32), scores_there.view(np.int32))
        for most in (1, top_k, experts, experts + 3):
            named = ranker.best(7, row.data_ptr(), most)
            assert (named is None) == (found is None)
            wanted = Prediction(7, tuple(experts_there[:most].tolist()), tuple(scores_there[:most].tolist()))
            assert named is None or named == wanted
    assert decided > 50


@pytest.mark.skipif(kernels.library() is None, reason="the kernels are not built")
@torch.no_grad()
def test_one_call_leaves_ties_nan_and_strange_inputs_to_others() -> None:
    gate = torch.eye(32).bfloat16()
    ranker = kernels.Ranker(gate, None, 2)
    x = torch.arange(32.0)[None].bfloat16()
    ranked = ranker(x)
    assert ranked is not None
    assert ranked[0].tolist() == list(range(31, -1, -1))
    x[0, 5] = x[0, 30]  # the second and the third
    assert ranker(x) is None
    x[0, 5], x[0, 3], x[0, 4] = -1.0, 0.0, -0.0
    ranked = ranker(x)
    assert ranked is not None
    assert ranked[0].tolist()[-4:] == [0, 3, 4, 5]
    assert ranker(x.float()) is None
    assert ranker(x[:, :16]) is None
    x[0, 0] = float("nan")
    assert ranker(x) is None


@pytest.mark.skipif(kernels.library() is None, reason="the kernels are not built")
@pytest.mark.parametrize("source", ["residual", "router_input", "pre_attention"])
def test_the_engine_ranks_in_one_call_as_in_four(source: str, tmp_path: Path) -> None:
    build("qwen3_moe", tmp_path, dtype="bfloat16")
    with Engine(RunConfig(model=str(tmp_path), memory_budget="100%", predictor="none")) as engine:
        signals, compared = engine.signals, 0

        class Compare:
            def on_route(self, step: RoutingStep) -> None:
                nonlocal compared
                target = (step.layer + 1) % signals.layers
                if step.phase is Phase.DECODE and signals._plain[target].trusted:
                    signals.layer, signals.moment = step.layer, Moment.AFTER_ROUTING
                    ranker = signals._ranker(target, source == "residual")
                    assert ranker is not None
                    fast, scores = signals.rank(target, source)
                    signals._rankers[target, source == "residual"] = None
                    slow, slow_scores = signals.rank(target, source)
                    signals._rankers[target, source == "residual"] = ranker
                    np.testing.assert_array_equal(fast, slow)
                    np.testing.assert_array_equal(scores, slow_scores)
                    for most in (1, 3, None):
                        named = signals.best(target, source, most)
                        assert named == (target, tuple(slow[:most].tolist()), tuple(slow_scores[:most].tolist()))
                    compared += ranker(signals._known(source)) is not None

        engine.observers.append(Compare())
        list(engine.stream(PROMPT, SamplingConfig(max_new_tokens=6)))
    assert compared
