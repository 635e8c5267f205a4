"""Dense layers of a decode step by the compiled kernels: the same numbers, the same choice on every budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foregate.engine.dense import DenseKernels
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
