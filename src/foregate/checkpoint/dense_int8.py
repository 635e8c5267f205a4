"""Dense matrices in int8: which of a model's they are, and the module that takes the place of ``nn.Linear``.

Shapes: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foregate.checkpoint.expand import expanded
from foregate.checkpoint.skeleton import Skeleton
from foregate.native import kernels

SCALE = "_scale"
"""What the name of a weight's scales adds to its own."""

SMALLEST = 1 << 14
"""Weights of a matrix that is worth quantising."""


class Int8Linear(nn.Module):
    """x · weightᵀ + bias with ``weight`` I8 [N, K] and ``weight_scale`` F32 [N]. Values come from a checkpoint."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, replaced: nn.Linear) -> None:
        super().__init__()
        device, (rows, columns) = replaced.weight.device, replaced.weight.shape
        self.in_features, self.out_features = columns, rows
        self.register_buffer("weight", torch.empty(rows, columns, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(rows, dtype=torch.float32, device=device))
        self.bias = replaced.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] for ``x`` [..., K]. The choice of kernel depends on the number of tokens alone."""
        rows = x.reshape(-1, self.in_features)
        out = self._few(rows) if self._fits(rows) else self._many(rows)
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def _fits(self, rows: Tensor) -> bool:
        few = len(rows) <= kernels.MOST_TOKENS and self.in_features <= kernels.MOST_COLUMNS
        return few and rows.dtype in kernels.ACTIVATIONS and kernels.library() is not None

    def _few(self, rows: Tensor) -> Tensor:
        return kernels.linear(kernels.matrix(self.weight, self.weight_scale), rows, self.out_features)

    def _many(self, rows: Tensor) -> Tensor:
        return F.linear(rows, expanded("weight", self.weight, self.weight_scale, tuple(self.weight.shape), rows.dtype))


def candidates(skeleton: Skeleton) -> frozenset[str]:
    """Names of the weights that can be int8: of plain linear layers, large, and no router's or other weight's too."""
    stored = skeleton.model.state_dict(keep_vars=True)
    uses = Counter(id(tensor) for tensor in stored.values())
    routed = {module.experts for module in skeleton.moe}
    return frozenset(
        f"{path}.weight"
        for path, module in skeleton.model.named_modules()
        if type(module) is nn.Linear
        and module.weight.numel() >= SMALLEST
        and module.out_features not in routed
        and uses[id(module.weight)] == 1
        and skeleton.loaded_dtype(f"{path}.weight", module.weight) == skeleton.dtype
    )


def replace_linears(model: nn.Module, weights: Collection[str]) -> None:
    """Put an ``Int8Linear`` in the place of the linear layer of each of ``weights`` (names that end in .weight)."""
    for name in weights:
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, Int8Linear(getattr(owner, child)))


def replaced(model: nn.Module) -> Iterator[str]:
    """Names of the weights that are int8 in ``model``."""
    return (f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Int8Linear))
