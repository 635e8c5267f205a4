"""A quantised matrix as numbers again, for products with many tokens. Shapes: N rows, K columns."""

from __future__ import annotations

import torch
from torch import Tensor

from foregate.checkpoint.quantise import dequantised
from foregate.native import kernels


def expanded(
    name: str, values: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype, transposed: bool = False
) -> Tensor:
    """A quantised matrix in ``dtype``: the same numbers with and without the compiled kernels."""
    padded = values.dtype is torch.uint8 and values.shape[0] * 16 != shape[0]
    if kernels.library() is None or dtype is not torch.bfloat16 or transposed or padded:
        return dequantised(name, values, scales, shape, transposed).to(dtype)
    return kernels.expand(kernels.matrix(values, scales), torch.empty(shape, dtype=dtype))
