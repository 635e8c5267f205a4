"""Feature tensors of one prompt as a safetensors file, bfloat16 included, without torch.

Shapes: N rows of the prompt's part, D feature size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize, serialize

from foregate.errors import TraceError

STORED = {"F16": "float16", "BF16": "bfloat16"}
"""safetensors' name of a type → ours."""


def encode_tensors(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of [N, D] tensors: float16 as they are, uint16 as the bits of bfloat16."""
    raw: dict[str, Any] = {}
    for name, values in tensors.items():
        dtype = "float16" if values.dtype == np.float16 else "bfloat16"
        raw[name] = {"dtype": dtype, "shape": list(values.shape), "data": np.ascontiguousarray(values).tobytes()}
    return bytes(serialize(raw, dict(metadata)))


def decode_tensors(content: bytes, where: str) -> dict[str, NDArray[np.float32]]:
    """The tensors, widened to float32 (exact). Raises TraceError naming ``where``."""
    try:
        found = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise TraceError(f"{where}: corrupted: no safetensors file ({error})") from None
    return {name: _widen(raw, where).reshape(raw["shape"]) for name, raw in found}


def _widen(raw: Mapping[str, Any], where: str) -> NDArray[np.float32]:
    kind = STORED.get(raw["dtype"])
    if kind is None:
        raise TraceError(f"{where}: a tensor of type {raw['dtype']}; known: {', '.join(STORED)}")
    bits = np.frombuffer(raw["data"], "<u2")
    return bits.view(np.float16).astype(np.float32) if kind == "float16" else widen_bfloat16(bits)


def widen_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 is the upper half of float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
