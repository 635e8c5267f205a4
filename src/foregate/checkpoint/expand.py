"""A quantised matrix as numbers again, for products with many tokens. Shapes: N rows, K columns."""

from __future__ import annotations

import torch
from torch import Tensor

from foregate.checkpoint.quantise import dequantised
from foregate.native import kernels


class Scratch:
    """Memory for matrices taken apart, one of each name, kept from call to call and written over.

    Large blocks may come from the kernel as fresh pages every time; whether they do is the allocator's state.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The memory of ``name``, in that shape and dtype, with whatever was left in it."""
        held = self._held.get(name)
        if held is None or held.shape != shape or held.dtype is not dtype:
            held = self._held[name] = torch.empty(shape, dtype=dtype)
        return held


def expanded(
    name: str,
    values: Tensor,
    scales: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    transposed: bool = False,
    scratch: Scratch | None = None,
) -> Tensor:
    """A quantised matrix in ``dtype``: the same numbers with and without the compiled kernels.

    With ``scratch`` it may lie there: it is good until the next matrix of that name.
    """
    padded = values.dtype is torch.uint8 and values.shape[0] * 16 != shape[0]
    if kernels.library() is None or dtype is not torch.bfloat16 or transposed or padded:
        return dequantised(name, values, scales, shape, transposed).to(dtype)
    out = torch.empty(shape, dtype=dtype) if scratch is None else scratch.take(name, shape, dtype)
    return kernels.expand(kernels.matrix(values, scales), out)
