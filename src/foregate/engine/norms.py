"""RMSNorms of few tokens by the compiled kernel: which of a model's they are, and the forward that they get.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foregate.native import kernels

NORM_VALUES = 1 << 15
"""Numbers up to which a norm is the kernel's: eight tokens of 32 heads of 128."""

TRIALS, ALIKE = 8, 0.99
"""A norm is believed to be the kernel's if on so many random rows this share of the outputs has the same bits."""


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is an RMSNorm as most families have it, by its parts and then by what it computes."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or kernels.library() is None:
        return False
    parts = list(module.parameters()) + list(module.buffers())
    fits = weight.dtype is torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()
    if len(parts) != 1 or not fits or weight.dim() != 1 or len(weight) % 16 or _epsilon(module) is None:
        return False
    rows = torch.randn(TRIALS, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.inference_mode():
        theirs, ours = module.forward(rows), kernels.rms_norm(rows, weight, _epsilon(module) or 0.0)
    same = theirs.dtype is ours.dtype and theirs.shape == ours.shape
    return same and bool((theirs == ours).float().mean() >= ALIKE) and torch.allclose(theirs, ours, rtol=0.01)


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def forward(module: nn.Module) -> Callable[..., Tensor]:
    """``module.forward`` by the kernel for few tokens; the choice depends on their number alone."""
    weight, small, theirs = module.weight, _epsilon(module), module.forward
    assert isinstance(weight, Tensor)
    assert small is not None

    def few_rows(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        few = x.dtype is torch.bfloat16 and x.numel() <= NORM_VALUES and x.is_contiguous()
        if not few or args or kwargs:
            return theirs(x, *args, **kwargs)
        return kernels.rms_norm(x, weight, small)

    vars(few_rows)["native"] = (weight, small)
    return few_rows


def native_norm(module: nn.Module) -> tuple[Tensor, float] | None:
    """Weight and epsilon of a norm that is the kernel's now; None for any other."""
    found: tuple[Tensor, float] | None = getattr(module.forward, "native", None)
    return found
