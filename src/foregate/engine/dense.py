"""Who computes the dense layers of a decode step: kernels for large matrices, norms, routers, attention and whole
self-attention modules, torch on one thread for the rest.

Waking a second thread costs torch more than a small operation does (measured: 0.54 ms for a router of 32 x 2048 on two
threads that wait passively, 0.03 ms on one), so it is worth it only where torch has large matrices left to multiply.
oneDNN prepares a product of one row for longer than torch's own loop takes for it (53 against 20 us for that router).
Shapes: T tokens, N outputs, K inputs, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foregate.checkpoint.anatomy import is_mixer
from foregate.checkpoint.dense_int8 import Int8Linear
from foregate.engine import attention, attention_block, norms, router
from foregate.engine.clock import Clock
from foregate.native import kernels
from foregate.native.matrix import Matrix

SMALLEST = 1 << 20
"""Weights of a bf16 matrix from which on the kernel is faster than torch, whatever the threads do."""

LARGE_SHARE = 0.9
"""Share of the weights in linear layers that the kernels must have for torch to be left one thread."""


class DenseKernels:
    """Large bf16 matrices, norms, routers and attention of ``model`` computed by the compiled kernels, until ``close``.

    ``sufficient``: so much of a decode step is theirs that torch needs one thread only. What is chosen depends on the
    model and the installation alone, so every budget and predictor computes the same bits.
    """

    def __init__(self, model: nn.Module) -> None:
        self.clock = Clock()
        """Time in their products: in all of a decode step, small ones apart, if ``timed``."""
        self._replaced: list[nn.Module] = []
        linears = [module for module in model.modules() if isinstance(module, (nn.Linear, Int8Linear))]
        weights = {module: module.weight.numel() for module in linears}
        native = 0
        for module in linears:
            if isinstance(module, Int8Linear):
                self._replace(module, partial(self.clock.timed, module.forward))
                native += weights[module] * (kernels.library() is not None)
            elif _suits(module):
                self._replace(module, _forward(module, self.clock))
                native += weights[module]
        for norm in filter(norms.is_norm, model.modules()):
            self._replace(norm, norms.forward(norm))
        blocks = attention_block.forwards(model, frozenset(self._replaced), self.clock)
        for part, forward in [*blocks, *router.forwards(model)]:
            self._replace(part, forward)
        self.sufficient = bool(weights) and native >= LARGE_SHARE * sum(weights.values())
        mixers = set(filter(is_mixer, model.modules()))
        self.timed = self.sufficient and mixers <= set(self._replaced)

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        object.__setattr__(module, "forward", forward)
        self._replaced.append(module)

    def close(self) -> None:
        """The model is as it was."""
        for module in self._replaced:
            module.__dict__.pop("forward", None)
        self._replaced.clear()

    @contextmanager
    def decode(self) -> Iterator[None]:
        """Around a decode step."""
        with attention.decoding(), self._torch_aside() if self.sufficient else nullcontext():
            yield

    @contextmanager
    def _torch_aside(self) -> Iterator[None]:
        """What is left to torch are small operations: one thread, and its own loops."""
        threads, onednn = torch.get_num_threads(), torch._C._get_mkldnn_enabled()
        kernels.use_threads(threads)
        torch.set_num_threads(1)
        torch._C._set_mkldnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(onednn)
            torch.set_num_threads(threads)
            kernels.use_threads(None)


def _suits(module: nn.Linear) -> bool:
    weight = module.weight
    fits = type(module) is nn.Linear and weight.dtype is torch.bfloat16 and weight.device.type == "cpu"
    large = weight.numel() >= SMALLEST and weight.shape[1] <= kernels.MOST_COLUMNS
    return fits and large and weight.is_contiguous() and kernels.library() is not None


def _forward(module: nn.Linear, clock: Clock) -> Callable[[Tensor], Tensor]:
    """``module.forward`` by the kernel for few tokens. The choice depends on the number of tokens alone."""
    weight, bias = module.weight, _bias(module)
    outputs, inputs = weight.shape
    matrix = kernels.matrix(weight, None)

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, inputs)
        if len(rows) > kernels.MOST_TOKENS or x.dtype is not torch.bfloat16:
            return F.linear(x, weight, bias)
        out = clock.timed(kernels.linear, matrix, rows, outputs)
        return (out if bias is None else out + bias).view(*x.shape[:-1], outputs)

    if bias is None:
        vars(forward)["native"] = matrix
    return forward


def native_linear(module: nn.Module) -> Matrix | None:
    """Weights of a linear layer that is the kernels' now and adds nothing; None for any other."""
    if isinstance(module, Int8Linear):
        plain = module.bias is None and kernels.library() is not None
        return kernels.matrix(module.weight, module.weight_scale) if plain else None
    found: Matrix | None = getattr(module.forward, "native", None)
    return found


def _bias(module: nn.Linear) -> Tensor | None:
    """torch's annotation leaves out that there may be none."""
    return module.bias
