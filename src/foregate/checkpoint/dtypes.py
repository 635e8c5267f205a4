"""The dtypes of safetensors files: their widths, their torch names, and which of them expert weights may have."""

from __future__ import annotations

import torch

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits of one element of every dtype that the safetensors format knows."""

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What unquantised expert weights are stored in; every other dtype is refused for them."""

DENSE_FLOATS = ("F64", *FLOATS)
"""What floating-point parameters and buffers outside the experts may be stored in; transformers converts them."""

_SPELLINGS = {dtype: name for name, dtype in {**FLOATS, "F64": torch.float64}.items()}


def spelling(dtype: torch.dtype) -> str:
    """``dtype`` as safetensors spells it. Raises KeyError for one that no model is loaded in."""
    return _SPELLINGS[dtype]
