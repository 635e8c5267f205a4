"""The values of an inflated tensor, block by block: the original's bits, random ones, and zeros of either sign.

Works on the bits of floating-point numbers, whose integer order is the order of their magnitudes.
Shapes: [R, C] are the rows and columns of the inflated tensor, [r, c] those of the original.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.errors import CheckpointError
from foregate.testing.inflate_axes import NONE, Axis, same
from foregate.testing.inflate_rules import Planned
from foregate.testing.tiny import source

Bits = NDArray[np.unsignedinteger[Any]]

BLOCK = 1 << 20
"""Elements made at a time."""


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """Widths, in bits, of a number and of its mantissa."""

    width: int
    mantissa: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(f"<u{self.width // 8}")

    @property
    def sign(self) -> int:
        return 1 << (self.width - 1)

    @property
    def bias(self) -> int:
        """Biased exponent of 1."""
        return (1 << (self.width - self.mantissa - 2)) - 1

    def exponents(self, values: Bits) -> Bits:
        """Biased exponents; 0 for zero and subnormal numbers."""
        exponents: Bits = (values & self.dtype.type(self.sign - 1)) >> self.dtype.type(self.mantissa)
        return exponents


FORMATS = {"BF16": FloatFormat(16, 7), "F16": FloatFormat(16, 10), "F32": FloatFormat(32, 23)}


def blocks(tensor: Planned, content: memoryview, seed: int) -> Iterator[Bits]:
    """The bits [R, C] of ``tensor`` in blocks of whole rows; ``content`` are the bytes of the original.

    Random values stay below the largest magnitude of their row (added rows: of the median row), so that quantising
    by row gives the original weights the scale that they had. Raises CheckpointError where dividing would round.
    """
    form = FORMATS[tensor.dtype]
    rows, columns = tensor.axes if len(tensor.axes) == 2 else (same(1), tensor.axes[0])
    values = np.frombuffer(content, form.dtype).reshape(rows.before, columns.before)
    values = divided(values, tensor, form)
    offsets = fill_exponents(values, rows, form)
    bits = source(tensor.name, seed).bit_generator
    step = max(1, BLOCK // len(columns))
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        raw = random_bits(bits, (part.stop - start) * len(columns), form).reshape(-1, len(columns))
        lay(raw, values, Axis(rows.before, rows.source[part], rows.free[part]), columns, offsets[part], form)
        yield raw


def divided(values: Bits, tensor: Planned, form: FloatFormat) -> Bits:
    """``values`` over 2^shift, exactly: the exponent alone changes."""
    if not tensor.shift:
        return values
    zero = (values & form.dtype.type(form.sign - 1)) == 0
    if bool((~zero & (form.exponents(values) <= tensor.shift)).any()):
        message = f"{tensor.source.path}: {tensor.name} has numbers too small to be divided by {2**tensor.shift}"
        raise CheckpointError(f"{message} in {tensor.dtype} without rounding")
    smaller: Bits = np.where(zero, values, values - form.dtype.type(tensor.shift << form.mantissa))
    return smaller


def fill_exponents(values: Bits, rows: Axis, form: FloatFormat) -> Bits:
    """Biased exponent [R] of the smallest random values of each row; the largest are below four times that."""
    largest = form.exponents(values).max(axis=1)
    usual = int(np.median(largest[largest > 0])) if bool((largest > 0).any()) else form.bias
    own = np.where(largest > 0, largest, usual)
    found = np.where(rows.source != NONE, own[rows.source], usual)
    clipped: Bits = np.clip(found.astype(np.int64) - 2, 1, None).astype(form.dtype)
    return clipped


def random_bits(bits: np.random.BitGenerator, count: int, form: FloatFormat) -> Bits:
    """``count`` random numbers of the width of ``form``, little endian on every machine."""
    words = np.asarray(bits.random_raw(-(-count * form.width // 64)), dtype="<u8")
    return words.view(form.dtype)[:count]


def lay(raw: Bits, values: Bits, rows: Axis, columns: Axis, exponents: Bits, form: FloatFormat) -> None:
    """Turn the random bits ``raw`` [rows, columns] into the block, in place."""
    number = form.dtype.type
    # sign, one bit of exponent, mantissa: as trained weights, but for the tails
    np.bitwise_and(raw, number(form.sign | (2 << form.mantissa) - 1), out=raw)
    zeros = np.flatnonzero(~rows.free), np.flatnonzero(~columns.free)
    signs = raw[np.ix_(*zeros)] & number(form.sign)
    np.add(raw, (exponents << number(form.mantissa))[:, None], out=raw)
    # zeros of random sign: exact as zeros, and no block of the file is all zero bytes
    raw[np.ix_(*zeros)] = signs
    carried = np.flatnonzero(rows.source != NONE), np.flatnonzero(columns.source != NONE)
    raw[np.ix_(*carried)] = values[np.ix_(rows.source[carried[0]], columns.source[carried[1]])]
