"""Feature tensors of one prompt as a safetensors file, bfloat16 included, without torch.

Shapes: N rows of the prompt's part, D feature size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.errors import TraceError
from foregate.trace.fields import Fields

F16, BF16 = "F16", "BF16"
STORED = {F16: "float16", BF16: "bfloat16"}
"""safetensors' names of the types → ours."""


def encode_tensors(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of [N, D] tensors: float16 as they are, uint16 as the bits of bfloat16."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    data = b""
    for name, values in tensors.items():
        content = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
        kind = F16 if values.dtype == np.float16 else BF16
        ends = [len(data), len(data) + len(content)]
        table[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": ends}
        data += content
    header = json.dumps(table, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def decode_tensors(content: bytes, where: str) -> dict[str, NDArray[np.float32]]:
    """The tensors, widened to float32 (exact). Raises TraceError naming ``where``."""
    size = int.from_bytes(content[:8], "little")
    try:
        table = json.loads(content[8 : 8 + size])
    except ValueError as error:
        raise TraceError(f"{where}: corrupted: no safetensors file ({error})") from None
    data = memoryview(content)[8 + size :]
    fields = Fields(table, where)
    return {name: _decode(fields.sub(name), data) for name in table if name != "__metadata__"}


@dataclass(frozen=True, slots=True)
class Bits:
    """A feature tensor that stays on disk: ``values`` [N, D], the 16 bits of ``kind`` (float16 or bfloat16), mapped."""

    values: NDArray[np.uint16]
    kind: str

    def widen(self, rows: slice) -> NDArray[np.float32]:
        """Rows as float32 (exact), read now."""
        bits = self.values[rows]
        return bits.view("<f2").astype(np.float32) if self.kind == "float16" else widen_bfloat16(bits)


def map_tensors(path: Path) -> dict[str, Bits]:
    """The tensors of a feature file, mapped and not read. Raises TraceError naming ``path``."""
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise TraceError(f"{path}: cannot be mapped ({error})") from None
    size = int.from_bytes(data[:8].tobytes(), "little")
    try:
        table = json.loads(data[8 : 8 + size].tobytes())
    except ValueError as error:
        raise TraceError(f"{path}: corrupted: no safetensors file ({error})") from None
    fields = Fields(table, str(path))
    body = data[8 + size :]
    return {name: _mapped(fields.sub(name), body) for name in table if name != "__metadata__"}


def _mapped(fields: Fields, data: NDArray[np.uint8]) -> Bits:
    kind, shape, (start, end) = _place(fields, len(data))
    return Bits(data[start:end].view("<u2").reshape(shape), kind)


def _decode(fields: Fields, data: memoryview) -> NDArray[np.float32]:
    kind, shape, (start, end) = _place(fields, len(data))
    bits = np.frombuffer(data[start:end], "<u2").reshape(shape)
    return bits.view("<f2").astype(np.float32) if kind == "float16" else widen_bfloat16(bits)


def _place(fields: Fields, size: int) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Type, shape and bytes of a tensor in ``size`` bytes of data."""
    kind = STORED[fields.choice("dtype", tuple(STORED))]
    shape, ends = fields.counts("shape"), fields.counts("data_offsets")
    if len(ends) != 2 or ends[1] > size or ends[1] - ends[0] != 2 * int(np.prod(shape)):
        raise TraceError(f"{fields.where}: corrupted: bytes {list(ends)} for shape {list(shape)}")
    return kind, shape, (ends[0], ends[1])


def widen_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 is the upper half of float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
