"""Dense layers of a decode step by the compiled kernels: the same numbers, the same choice on every budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from foregate.engine import attention
from foregate.engine.dense import DenseKernels
from foregate.errors import IntegrityError
from foregate.native import kernels

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the kernels are not built")


def model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1024, 2048, bias=True), nn.Linear(2048, 1024, bias=False)).to(dtype)


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_large_bf16_layers_agree_with_torch(tokens: int) -> None:
    layers = model(torch.bfloat16)
    x = torch.randn(1, tokens, 1024, dtype=torch.bfloat16)
    wanted = layers(x).float()
    dense = DenseKernels(layers)
    assert dense.sufficient
    assert torch.allclose(layers(x).float(), wanted, atol=2e-2, rtol=2e-2)
    assert tokens <= kernels.MOST_TOKENS or torch.equal(layers(x).float(), wanted)
    dense.close()
    assert torch.equal(layers(x).float(), wanted)


def test_float32_is_left_to_torch_and_its_threads() -> None:
    layers = model(torch.float32)
    dense = DenseKernels(layers)
    assert not dense.sufficient
    assert "forward" not in layers[0].__dict__
    before = torch.get_num_threads()
    with dense.decode():
        assert torch.get_num_threads() == before


@torch.inference_mode()
def test_threads_change_no_bit_and_are_given_back() -> None:
    layers = model(torch.bfloat16)
    dense = DenseKernels(layers)
    x = torch.randn(1, 1, 1024, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with dense.decode():
            assert (torch.get_num_threads(), kernels.num_threads()) == (1, 2)
            narrow = layers(x)
        assert torch.get_num_threads() == kernels.num_threads() == 2
        assert torch.equal(layers(x), narrow)
    finally:
        torch.set_num_threads(before)


# Norms


@torch.inference_mode()
def test_a_norm_has_torchs_bits_whatever_the_kernels_level() -> None:
    torch.manual_seed(1)
    norm = Qwen3MoeRMSNorm(256).to(torch.bfloat16)
    norm.weight.uniform_(-2, 2)
    x = 30 * torch.randn(1, 8, 256, dtype=torch.bfloat16)
    wanted = norm(x)
    dense = DenseKernels(nn.Sequential(norm))
    assert "forward" in norm.__dict__
    library = kernels.library()
    assert library is not None
    for level in (0, 1, 2):
        library.foregate_kernels(level)
        assert (norm(x) == wanted).float().mean() > 0.999
        assert torch.allclose(norm(x), wanted, rtol=0.01)
    assert torch.equal(norm(30 * x.repeat(1, 20, 1)), dense_closed(dense, norm, 30 * x.repeat(1, 20, 1)))


def dense_closed(dense: DenseKernels, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    dense.close()
    assert "forward" not in norm.__dict__
    out: torch.Tensor = norm(x)
    return out


@torch.inference_mode()
def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    norm = Gemma3RMSNorm(64).to(torch.bfloat16)  # 1 + weight
    norm.weight.fill_(0.5)
    DenseKernels(nn.Sequential(norm))
    assert "forward" not in norm.__dict__


@torch.inference_mode()
def test_nothing_is_hidden_by_the_norm() -> None:
    weight = torch.ones(32, dtype=torch.bfloat16)
    x = torch.zeros(3, 32, dtype=torch.bfloat16)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    out = kernels.rms_norm(x, weight, 1e-6)
    assert torch.equal(out[0], x[0])
    assert out[1].isnan().all()
    assert out[2, 7].isnan()


# Outputs of experts, combined


@torch.inference_mode()
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (4, 2048), (8, 80), (64, 32)])
def test_outputs_are_weighed_added_and_rounded_once(rows: int, width: int, dtype: torch.dtype, level: int) -> None:
    maker = torch.Generator().manual_seed(rows)
    parts = torch.randn(rows, width, generator=maker).bfloat16()
    weights = torch.rand(1, rows, generator=maker).to(dtype)
    library = kernels.loaded()
    library.foregate_kernels(level)
    try:
        assert kernels.combines(parts[:1], weights)
        found = kernels.combine(parts, weights)
    finally:
        library.foregate_kernels(2)
    wanted = (weights.double() @ parts.double()).float()
    assert found.shape == (1, width)
    assert torch.allclose(found.float(), wanted, rtol=0.005, atol=1e-5)


def test_what_cannot_be_combined_is_not_taken() -> None:
    x, weights = torch.zeros(1, 32, dtype=torch.bfloat16), torch.ones(1, 4)
    assert kernels.combines(x, weights)
    assert not kernels.combines(x.float(), weights)
    assert not kernels.combines(x[:, :24], weights)
    assert not kernels.combines(x, weights.double())
    assert not kernels.combines(x, torch.ones(1, 65))
    with pytest.raises(IntegrityError):
        kernels.combine(torch.zeros(65, 32, dtype=torch.bfloat16), torch.ones(1, 65))


# Attention

HEADS = ((4, 4, 16, 16), (32, 4, 128, 128), (16, 16, 192, 128), (8, 2, 64, 64))


def token(heads: int, shared: int, width: int, out_width: int, positions: int) -> tuple[torch.Tensor, ...]:
    maker = torch.Generator().manual_seed(positions)
    shapes = ((1, heads, 1, width), (1, shared, positions + 3, width), (1, positions + 3, shared, out_width))
    query, key, value = (torch.randn(shape, generator=maker).bfloat16() for shape in shapes)
    return query, key[:, :, :positions], value.transpose(1, 2)[:, :, :positions]


@torch.inference_mode()
@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("positions", [1, 7, 600])
def test_attention_agrees_with_torch_and_threads_change_no_bit(shape: tuple[int, ...], positions: int) -> None:
    query, key, value = token(*shape, positions)
    assert kernels.attends(query, key, value)
    out = kernels.attend(query, key, value, 0.1)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=0.1, enable_gqa=True)
    assert torch.allclose(out.double(), exact.transpose(1, 2), atol=2e-3, rtol=8e-3)
    kernels.use_threads(2)
    try:
        assert torch.equal(kernels.attend(query, key, value, 0.1), out)
    finally:
        kernels.use_threads(None)


@torch.inference_mode()
def test_only_one_token_without_a_mask_and_only_while_decoding_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    ours = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *given: calls.append(1) or ours(*given))
    query, key, value = token(8, 2, 64, 64, 5)
    module = nn.Module()
    module.num_key_value_groups = 4
    with attention.decoding():
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out, _ = attend(module, query, key, value, None, scaling=0.125, dropout=0.0, sliding_window=None)
        assert len(calls) == 1
        mask = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
        mask[..., 2] = True
        masked, _ = attend(module, query, key, value, mask, scaling=0.125)
        assert torch.allclose(masked[0, 0, ::4], value[0, :, 2], atol=1e-2)
        attend(module, query.repeat(1, 1, 2, 1), key, value, None, scaling=0.125)
        attend(module, query, key, value, None, scaling=0.125, position_bias=torch.zeros(1, 8, 1, 5))
    after, _ = attend(module, query, key, value, None, scaling=0.125)
    assert len(calls) == 1
    assert torch.allclose(out.float(), after.float(), atol=2e-2, rtol=2e-2)
