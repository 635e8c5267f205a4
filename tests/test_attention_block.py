"""Self-attention in compiled calls: the bits of the module's own forward, or its own forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache, PreTrainedModel

from foregate.checkpoint.dense_int8 import Int8Linear
from foregate.engine import attention_block, dense
from foregate.engine.dense import DenseKernels
from foregate.engine.kv_room import make_room
from foregate.native import kernels
from foregate.native.attention_block import AttentionBlock
from foregate.testing.families import config_of
from foregate.testing.tiny import randomised

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the kernels are not built")

TAKEN = ("qwen3_moe", "olmoe", "qwen2_moe", "mixtral", "glm4_moe")


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "SMALLEST", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way each attention by the kernels went: ``qkv`` (in two calls) or ``attention`` (in one)."""
    found: list[str] = []

    def counted(name: str, ours: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            found.append(name)
            return ours(*args)

        return call

    for name in ("qkv", "attention"):
        monkeypatch.setattr(AttentionBlock, name, counted(name, getattr(AttentionBlock, name)))
    return found


def built(family: str, *, int8: bool = False, **overrides: Any) -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(family, **config_of(family, **{**sizes, **overrides}))
    model = randomised(config, 0, torch.bfloat16)
    if int8:
        for module in attentions(model):
            for name in attention_block.PROJECTIONS:
                setattr(module, name, quantised(getattr(module, name)))
    return model


def quantised(linear: nn.Linear) -> Int8Linear:
    made = Int8Linear(linear)
    scale = linear.weight.detach().float().abs().amax(1) / 127
    made.weight.copy_((linear.weight.detach().float() / scale[:, None]).round())
    made.weight_scale.copy_(scale)
    return made


def attentions(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("self_attn")]


@torch.inference_mode()
def decoded(
    model: PreTrainedModel, kernel: DenseKernels, prompt: int = 5, tokens: int = 4, *, room: bool = False
) -> list[Tensor]:
    """Logits of a prompt and of the tokens after it, then what is in the cache."""
    ids = torch.randint(3, 60, (1, prompt + tokens), generator=torch.Generator().manual_seed(0))
    past = DynamicCache(config=model.config)
    found = [model(input_ids=ids[:, :prompt], past_key_values=past, use_cache=True).logits]
    if room:
        make_room(past)
    for at in range(prompt, prompt + tokens):
        with kernel.decode():
            found.append(model(input_ids=ids[:, at : at + 1], past_key_values=past, use_cache=True).logits)
    return [*found, *(state for keys, values, _ in past for state in (keys, values) if state is not None)]


def without_blocks(model: PreTrainedModel) -> list[Tensor]:
    """``decoded`` by the attention modules' own forward."""
    kernel = DenseKernels(model)
    for module in attentions(model):
        module.__dict__.pop("forward", None)
    found = decoded(model, kernel)
    kernel.close()
    return found


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("family", TAKEN)
def test_a_decoded_token_has_the_bits_of_the_modules_own_forward(family: str, int8: bool, calls: list[str]) -> None:
    model = built(family, int8=int8)
    wanted = without_blocks(model)
    calls.clear()
    kernel = DenseKernels(model)
    assert all("forward" in module.__dict__ for module in attentions(model))
    calls.clear()
    assert same(decoded(model, kernel), wanted)
    assert calls == ["qkv"] * 4 * len(attentions(model))
    calls.clear()
    assert same(decoded(model, kernel, room=True), wanted)
    assert calls == ["attention"] * 4 * len(attentions(model))


@pytest.mark.parametrize("level", [0, 1])
def test_processors_without_avx512_have_the_same_bits_too(level: int) -> None:
    library = kernels.library()
    assert library is not None
    library.foregate_kernels(level)
    try:
        model = built("qwen3_moe", int8=True)
        wanted = without_blocks(model)
        kernel = DenseKernels(model)
        assert all("forward" in module.__dict__ for module in attentions(model))
        assert same(decoded(model, kernel), wanted)
    finally:
        library.foregate_kernels(2)


def test_threads_change_no_bit() -> None:
    model = built("qwen3_moe", int8=True)
    kernel = DenseKernels(model)
    once = decoded(model, kernel)
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        assert same(decoded(model, kernel), once)
    finally:
        torch.set_num_threads(before)


def test_closing_gives_the_modules_their_own_forward_back(calls: list[str]) -> None:
    model = built("qwen3_moe")
    kernel = DenseKernels(model)
    kernel.close()
    assert not any("forward" in module.__dict__ for module in model.modules())
    calls.clear()
    decoded(model, kernel)
    assert not calls


@pytest.mark.parametrize("part", ["q_proj", "o_proj", "k_norm"])
def test_a_hook_on_a_part_that_would_be_passed_by_still_fires(part: str, calls: list[str]) -> None:
    model = built("qwen3_moe")
    wanted = without_blocks(model)
    kernel = DenseKernels(model)
    first, *others = attentions(model)
    seen: list[int] = []
    handle = first.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    calls.clear()
    assert same(decoded(model, kernel, tokens=4), wanted)
    assert len(seen) == 1 + 4  # the prompt too
    assert len(calls) == 4 * len(others)
    handle.remove()
    calls.clear()
    decoded(model, kernel)
    assert len(calls) == 4 * (1 + len(others))


def test_a_hook_on_all_modules_still_fires(calls: list[str]) -> None:
    model = built("mixtral")
    kernel = DenseKernels(model)
    seen: set[nn.Module] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    calls.clear()
    try:
        decoded(model, kernel)
    finally:
        handle.remove()
    assert {module.get_submodule("q_proj") for module in attentions(model)} <= seen
    assert not calls


class Gated(nn.Module):
    """Something more than projections and norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, width, dtype=torch.bfloat16)


def test_attention_with_something_more_is_left_alone() -> None:
    gated = built("qwen3_next")
    DenseKernels(gated)
    assert attentions(gated)
    assert not any("forward" in module.__dict__ for module in attentions(gated))
    model = built("mixtral")
    first, *others = attentions(model)
    first.gate = Gated(64)
    DenseKernels(model)
    assert "forward" not in first.__dict__
    assert all("forward" in module.__dict__ for module in others)


def test_attention_that_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("mixtral")
    kind = type(attentions(model)[0])
    theirs = kind.forward

    @wraps(theirs)
    def doubled(self: nn.Module, hidden_states: Tensor, position_embeddings: Any, **kwargs: Any) -> Any:
        out, weights = theirs(self, hidden_states, position_embeddings, **kwargs)
        return 2 * out, weights

    monkeypatch.setattr(kind, "forward", doubled)
    DenseKernels(model)
    assert not any("forward" in module.__dict__ for module in attentions(model))


def test_clipped_projections_are_left_alone() -> None:
    model = built("olmoe", clip_qkv=1000.0)
    DenseKernels(model)
    assert not any("forward" in module.__dict__ for module in attentions(model))


def test_a_mask_a_batch_and_a_strange_cache_are_their_own_forwards(calls: list[str]) -> None:
    model = built("mixtral")
    kernel = DenseKernels(model)
    calls.clear()

    class Strange(DynamicCache):
        pass

    past = Strange(config=model.config)
    with torch.inference_mode(), kernel.decode():
        model(input_ids=torch.tensor([[5]]), past_key_values=past, use_cache=True)
        model(input_ids=torch.tensor([[5], [6]]))
        model(input_ids=torch.tensor([[5, 6]]))
        assert not calls
        model(input_ids=torch.tensor([[5]]), use_cache=False)
        assert len(calls) == len(attentions(model))


@pytest.mark.parametrize("room", [False, True])
def test_a_cache_that_was_changed_is_attended_to_by_the_module_itself(room: bool, calls: list[str]) -> None:
    model = built("mixtral")
    kernel = DenseKernels(model)
    past = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=past, use_cache=True)
        if room:
            make_room(past)
        for layer in past.layers:
            layer.values = layer.values[:, :, :-1]
        calls.clear()
        with kernel.decode():
            model(input_ids=torch.tensor([[8]]), past_key_values=past, use_cache=True)
    assert not calls
