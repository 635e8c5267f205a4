"""Safetensors headers, parsed and checked without reading a weight: 8 bytes of length (little endian), then JSON."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Any

from foregate.checkpoint.dtypes import BITS
from foregate.checkpoint.jsonfile import parse
from foregate.errors import CheckpointError
from foregate.types import Segment

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format; a larger length is junk."""


def read_header(path: Path) -> dict[str, Segment]:
    """Every tensor of the safetensors file ``path``, in the order of its offsets.

    Raises CheckpointError, naming the file, if it is missing, truncated or inconsistent.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: not a safetensors file (the header length is {length} bytes)")
            if size < 8 + length:
                raise CheckpointError(f"{path}: truncated: expected {8 + length} bytes of header, found {size}")
            raw = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in _entries(path, raw)]
    return _checked(path, sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)), 8 + length, size)


def _entries(path: Path, raw: bytes) -> list[tuple[str, Any]]:
    try:
        header = parse(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: the safetensors header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is a JSON {type(header).__name__}, not an object")
    return [(name, entry) for name, entry in header.items() if name != "__metadata__"]


def _tensor(path: Path, name: str, entry: Any, base: int) -> Segment:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        counts = (*shape, begin, end)
        if not all(isinstance(count, int) and count >= 0 for count in counts) or end < begin:
            raise ValueError("a negative or fractional number")
        nbytes = prod(shape) * BITS[dtype] // 8
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: junk in the header of tensor {name!r}: {error!r}") from None
    if nbytes != end - begin:
        message = f"{path}: tensor {name!r} is {dtype} {list(shape)}, {nbytes} bytes, but its range has {end - begin}"
        raise CheckpointError(message)
    return Segment(str(path), name, base + begin, nbytes, dtype, shape)


def _checked(path: Path, tensors: list[Segment], base: int, size: int) -> dict[str, Segment]:
    """``tensors`` by name; the format forbids overlaps, holes and bytes that no tensor owns."""
    expected = base
    for tensor in tensors:
        if tensor.offset != expected:
            kind = "overlaps the tensor before it" if tensor.offset < expected else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {tensor.tensor!r} at byte {tensor.offset} {kind} (ends at {expected})"
            )
        expected += tensor.nbytes
    if expected > size:
        raise CheckpointError(f"{path}: truncated: expected {expected} bytes, found {size}")
    if expected < size:
        raise CheckpointError(f"{path}: {size - expected} bytes after the last tensor (expected {expected} bytes)")
    return {tensor.tensor: tensor for tensor in tensors}
