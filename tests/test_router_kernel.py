"""Routers of one token in a compiled call: the choice of the module's own forward, or its own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from foregate.engine import router as routers
from foregate.engine.dense import DenseKernels
from foregate.errors import IntegrityError
from foregate.native import kernels
from foregate.native.router import Router
from foregate.testing.families import config_of
from foregate.testing.tiny import randomised

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the kernels are not built")

TAKEN = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "jamba", "qwen3_next")
LEFT_ALONE = ("deepseek_v3", "gpt_oss", "llama4_text", "phimoe", "granitemoe", "ernie4_5_moe", "minimax_m2")
"""Sigmoids, biases, groups, softmax of the chosen with a matrix of another name."""


def routers_of(family: str) -> list[nn.Module]:
    model = randomised(AutoConfig.for_model(family, **config_of(family)), 0, torch.bfloat16)
    return [module for module in model.modules() if type(module).__name__.endswith(("Router", "Gate"))]


def tokens(count: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


@torch.inference_mode()
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("family", TAKEN)
def test_one_token_is_routed_as_by_the_modules_own_forward(family: str, level: int) -> None:
    library = kernels.library()
    assert library is not None
    found = routers_of(family)
    assert found
    library.foregate_kernels(level)
    try:
        for module in found:
            x = tokens(200, module.weight.shape[1])
            theirs = [module(row[None]) for row in x]
            dense = DenseKernels(nn.Sequential(module))
            assert "forward" in module.__dict__
            ours = [module(row[None]) for row in x]
            dense.close()
            assert "forward" not in module.__dict__
            same = sum(torch.equal(a[2], b[2]) for a, b in zip(theirs, ours, strict=True))
            assert same >= 190
            for a, b in zip(theirs, ours, strict=True):
                assert [(part.dtype, part.shape) for part in a] == [(part.dtype, part.shape) for part in b]
                assert torch.allclose(a[0].float(), b[0].float(), rtol=0.02, atol=0.02)
                if torch.equal(a[2], b[2]):
                    assert torch.allclose(a[1].float(), b[1].float(), rtol=0.02)
    finally:
        library.foregate_kernels(2)


@pytest.mark.parametrize("family", LEFT_ALONE)
def test_routers_that_compute_something_else_are_left_alone(family: str) -> None:
    found = routers_of(family)
    assert found
    DenseKernels(nn.ModuleList(found))
    assert not any("forward" in module.__dict__ for module in found)


class FakeRouter(nn.Module):
    """As most families have it; ``changed`` makes something else of what it gives."""

    def __init__(self, changed: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.weight, self.top_k, self.changed = nn.Parameter(gate()), 4, changed

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden_states.reshape(-1, 64), self.weight)
        best, chosen = logits.float().softmax(-1).topk(self.top_k)
        return self.changed(logits, best.bfloat16(), chosen)


def is_taken(module: nn.Module) -> bool:
    return bool(list(routers.forwards(nn.Sequential(module))))


CHANGES: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "weights": lambda logits, best, chosen: (logits, best * 1.02, chosen),
    "logits": lambda logits, best, chosen: (logits * 1.1, best, chosen),
    "choice": lambda logits, best, chosen: (logits, best, (chosen + 1) % 40),
    "order": lambda logits, best, chosen: (logits, best, chosen.flip(1)),
    "dtype": lambda logits, best, chosen: (logits.float(), best, chosen),
    "width": lambda logits, best, chosen: (logits, best[:, :3], chosen[:, :3]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_a_router_gives_otherwise_it_is_left_alone(change: Any) -> None:
    assert is_taken(FakeRouter(lambda *given: given))
    assert not is_taken(FakeRouter(change))


def rounded_up(logits: Tensor, best: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit of every eighth token one step of bf16 up, as another order of sums may give it."""
    moved = logits.clone()
    some, first = torch.arange(0, len(logits), 8), chosen[::8, 0]
    moved[some, first] += moved[some, first].abs() * torch.finfo(moved.dtype).eps
    return moved, moved.float().softmax(-1).topk(best.shape[1])[0].bfloat16(), chosen


def test_a_logit_that_is_rounded_the_other_way_is_no_other_router() -> None:
    assert is_taken(FakeRouter(rounded_up))


def test_weights_that_are_wrong_only_where_logits_are_rounded_the_other_way_are_another_router() -> None:
    def wrong(logits: Tensor, best: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        moved, weights, chosen = rounded_up(logits, best, chosen)
        weights[::8] *= 1.5
        return moved, weights, chosen

    assert not is_taken(FakeRouter(wrong))


@pytest.mark.parametrize("name", ["num_group", "n_group", "topk_group"])
def test_groups_are_seen_though_random_tokens_may_not_show_them(name: str) -> None:
    module = FakeRouter(lambda *given: given)
    setattr(module, name, 1)
    assert is_taken(module)
    setattr(module, name, 4)
    assert not is_taken(module)


def test_a_router_with_a_bias_is_left_alone() -> None:
    module = FakeRouter(lambda *given: given)
    module.register_buffer("bias", torch.zeros(40))
    assert not is_taken(module)


def gate(experts: int = 40, width: int = 64) -> Tensor:
    return tokens(experts, width, seed=2) / 8


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(40, 6), (7, 1), (5, 5), (300, 8)])
def test_the_choice_is_the_softmax_of_what_it_says(
    experts: int, top_k: int, normalised: bool, dtype: torch.dtype
) -> None:
    matrix = gate(experts)
    router = Router(matrix, top_k, normalised=normalised, dtype=dtype)
    told = 0
    for x in tokens(60, 64):
        routed = router(x)
        if routed is None:
            continue
        told += 1
        logits, weights, chosen = routed
        assert torch.allclose(logits[0].float(), (matrix.double() @ x.double()).float(), rtol=0.01, atol=0.01)
        shares = logits[0].double().softmax(0)
        order = shares.argsort(descending=True, stable=True)[:top_k]
        wanted = shares[order] / (shares[order].sum() if normalised else 1)
        assert torch.equal(chosen[0], order)
        assert weights.dtype is dtype
        assert torch.allclose(weights[0].double(), wanted, rtol=1e-5 if dtype is torch.float32 else 0.004)
    assert told > 10


@torch.inference_mode()
def test_ties_and_what_is_no_number_are_left_to_the_module() -> None:
    matrix = gate()
    matrix[3] = matrix[11] = tokens(1, 64)[0] / 16
    router = Router(matrix, 6, normalised=True, dtype=torch.bfloat16)
    routed = router(tokens(1, 64)[0])
    assert routed is not None
    assert routed[2][0, :2].tolist() == [3, 11]  # the best two, and equal
    last = Router(matrix, 1, normalised=True, dtype=torch.bfloat16)
    assert last(tokens(1, 64)[0]) is None
    x = tokens(1, 64, seed=5)[0]
    x[7] = float("nan")
    assert router(x) is None
    x[7] = float("inf")
    assert router(x) is None
    far = torch.zeros(8, 64, dtype=torch.bfloat16)
    far[:, 0] = torch.arange(8) * 200.0
    vanishing = Router(far, 3, normalised=False, dtype=torch.float32)
    assert vanishing(torch.ones(64, dtype=torch.bfloat16)) is None  # only one of them has a weight at all


def test_a_gate_of_another_shape_is_refused() -> None:
    router = Router(gate(), 6, normalised=True, dtype=torch.bfloat16)
    router.top_k = 41
    with pytest.raises(IntegrityError):
        router(tokens(1, 64)[0])


@torch.inference_mode()
def test_several_tokens_ties_and_other_dtypes_go_to_the_modules_own_forward() -> None:
    (module, *_) = routers_of("mixtral")
    calls: list[int] = []
    own = type(module).forward

    def counted(self: Any, hidden_states: Tensor) -> Any:
        calls.append(len(hidden_states))
        return own(self, hidden_states)

    module.forward = counted.__get__(module)
    ((_, forward),) = routers.forwards(nn.Sequential(module))
    calls.clear()
    width = module.weight.shape[1]
    forward(tokens(1, width))
    assert calls == []
    forward(tokens(2, width))
    forward(torch.zeros(1, width, dtype=torch.bfloat16))  # every expert ties
    assert calls == [2, 1]
    with pytest.raises(RuntimeError):
        forward(tokens(1, width).float())
