"""The tensors of a pack's dense file: where each comes from, and its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from foregate.checkpoint.dense_int8 import SCALE
from foregate.checkpoint.dtypes import FLOATS
from foregate.checkpoint.quantise import Scheme, quantised
from foregate.checkpoint.source_reader import PIECE_BYTES, SourceReader
from foregate.types import Segment

INT8 = Scheme(8)


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """One tensor of the dense file. ``part``: which of the two results of quantising ``source`` it is; -1: itself."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: Segment
    part: int = -1

    def pieces(self, reader: SourceReader) -> Iterator[memoryview]:
        """Its bytes, in order. Rows are quantised by themselves, so a few of them at a time give the same bytes."""
        source = self.source
        if self.part < 0:
            yield from reader.pieces(source.path, source.offset, source.nbytes)
            return
        rows, columns = source.shape
        row_bytes = source.nbytes // rows
        step = max(1, PIECE_BYTES // row_bytes)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            raw = reader.read(source.path, source.offset + first * row_bytes, count * row_bytes)
            weight = torch.frombuffer(bytearray(raw), dtype=FLOATS[source.dtype]).view(count, columns)
            tensor = quantised("weight", weight, INT8)[self.part][1]
            yield memoryview(tensor.contiguous().view(torch.uint8).numpy().ravel().data)


def dense_tensors(tensors: Iterable[Segment], int8: Iterable[str]) -> list[DenseTensor]:
    """The dense file's tensors from those of the source; the matrices named in ``int8`` become two."""
    wanted = frozenset(int8)
    found: list[DenseTensor] = []
    for tensor in tensors:
        if tensor.tensor in wanted and tensor.dtype in FLOATS and len(tensor.shape) == 2:
            rows, columns = tensor.shape
            found.append(DenseTensor(tensor.tensor, "I8", tensor.shape, rows * columns, tensor, 0))
            found.append(DenseTensor(tensor.tensor + SCALE, "F32", (rows,), 4 * rows, tensor, 1))
        else:
            found.append(DenseTensor(tensor.tensor, tensor.dtype, tensor.shape, tensor.nbytes, tensor))
    return found
