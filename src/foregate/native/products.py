"""Matrices times one vector for predictors: int8 or int4 by the compiled kernels, else float32 by numpy. No torch.

Shapes: L matrices of one size, N outputs, K inputs.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int, c_void_p
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.errors import IntegrityError
from foregate.native.library import calls, function, load
from foregate.native.matrix import F32, INT4, INT8, MOST_COLUMNS, Matrix, RowsOf, threads_asked

Floats = NDArray[np.float32]

BLOCK, GROUP = 16, 64
"""Rows of a block of int4, and columns that share a scale."""
WORTH_A_THREAD = 1 << 20
"""Bytes of a matrix from which on a second thread is woken for it."""


class Products:
    """``weights`` [L, N, K], float32, rounded where the kernels are: a prediction costs the memory that it reads.

    ``dtype``: INT8 (a scale a row) or INT4 (a scale every 64 columns of a row; both sizes are filled up with zeros).
    ``x`` [K] is the input: write to it, then ask for a matrix. Outputs are those of the caller until the next call.
    """

    def __init__(self, weights: Floats, dtype: int = INT8) -> None:
        count, outputs, inputs = weights.shape
        rows, columns = _padded(outputs, inputs) if dtype == INT4 else (outputs, inputs)
        self._x, self._out = np.zeros(columns, np.float32), np.zeros(rows, np.float32)
        self.x, self.count, self.outputs = self._x[:inputs], count, outputs
        self.nbytes = 4 * self.size
        self._run: Any = _linear() if 0 < columns <= MOST_COLUMNS and outputs else None
        self.matrices: list[Matrix] = []
        """For the kernels; none where numpy multiplies. They hold no reference to the weights: ``self`` does."""
        if self._run is None or not count:
            self._weights: list[NDArray[Any]] = [np.ascontiguousarray(weights, np.float32)]
            return
        made = [to_int4(matrix) if dtype == INT4 else to_int8(matrix) for matrix in weights]
        # One block each: of a block the system may make large pages.
        self._weights = [np.stack(part) for part in zip(*made, strict=True)]
        values, scales = self._weights
        self.matrices = [
            Matrix(value.ctypes.data, scale.ctypes.data, dtype, rows, columns, GROUP if dtype == INT4 else 0)
            for value, scale in zip(values, scales, strict=True)
        ]
        self.nbytes = values[0].nbytes + scales[0].nbytes
        self._large = self.nbytes >= WORTH_A_THREAD
        self._given = [ctypes.byref(matrix) for matrix in self.matrices]
        self._from, self._to = self._x.ctypes.data, self._out.ctypes.data

    @property
    def size(self) -> int:
        """Numbers of one matrix; ``nbytes`` are its bytes as they lie in memory."""
        return int(len(self.x) * self.outputs)

    def of(self, number: int) -> Floats:
        """Matrix ``number`` times ``x``, [N]: overwritten by the next call."""
        if self._run is None:
            return np.matmul(self._weights[0][number], self.x, out=self._out[: self.outputs])
        inputs, outputs = len(self._x), len(self._out)
        threads = (threads_asked() or 1) if self._large else 1
        if self._run(self._given[number], self._from, inputs, F32, 1, self._to, outputs, F32, threads):
            raise IntegrityError(f"the kernels refused a matrix of {outputs} x {inputs}")
        return self._out[: self.outputs]

    def __call__(self, number: int, x: Floats) -> Floats:
        """Matrix ``number`` times ``x`` [K], [N]: overwritten by the next call."""
        self.x[:] = x
        return self.of(number)


class Rows:
    """``weights`` [L, K, N], float32, of which rows are picked and added.

    For the kernels they are int8, with a scale a column, unless ``exact``.
    """

    def __init__(self, weights: Floats, *, exact: bool = False) -> None:
        self.count, self.columns = weights.shape[1:]
        self.given: list[RowsOf] = []
        """For the kernels; they hold no reference to the numbers. None where numpy adds."""
        self._add: Any = None
        self._values: NDArray[Any] = weights
        self._scales = np.ones((len(weights), self.columns), np.float32)
        if _linear() is None or not weights.size:
            return
        if exact:
            self._values = np.ascontiguousarray(weights, np.float32)
            self.given = [RowsOf(matrix.ctypes.data, None) for matrix in self._values]
            self._at = [ctypes.addressof(given) for given in self.given]
            self._add = _add_rows()
            return
        self._values = np.empty(weights.shape, np.int8)
        for number, matrix in enumerate(weights):
            values, self._scales[number] = to_int8(matrix.T)
            self._values[number] = values.T
        self.given = [RowsOf(v.ctypes.data, s.ctypes.data) for v, s in zip(self._values, self._scales, strict=True)]

    def of(self, number: int, rows: NDArray[np.int64]) -> Floats:
        """The ``rows`` [k] of matrix ``number``, float32 [k, N]."""
        picked: Floats = self._values[number][rows] * self._scales[number]
        return picked

    def add(self, number: int, rows: NDArray[np.int64], factors: Floats | None, out: Floats) -> None:
        """Add the ``rows`` [k] of matrix ``number`` that exist, each times its factor [k] (None: 1), to ``out`` [N].
        All are in one piece, int64 and float32."""
        if self._add is None:
            there = (rows >= 0) & (rows < self.count)
            picked = self.of(number, rows[there])
            out += picked.sum(axis=0) if factors is None else factors[there] @ picked
        elif self._add(self._at[number], self.count, self.columns, rows, factors, len(rows), out):
            raise IntegrityError(f"the kernels refused to add rows of {self.columns}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as it lies in memory."""
        return int(self.columns * self._values.itemsize)


def to_int8(weights: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Finite ``weights`` [N, K] as int8 [N, K] and a scale [N] of every row."""
    scales = np.maximum(np.abs(weights).max(axis=1, initial=0.0), np.float32(1e-30)) / np.float32(127)
    return np.rint(weights / scales[:, None]).astype(np.int8, order="C"), scales


def to_int4(weights: Floats) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Finite ``weights`` [N, K] in the format of ``checkpoint/quantise.py``, without its torch (and its search for the
    best scale, which a pack is worth): filled up to [n, k]: [n / 16, k / 8, 64] bytes of two numbers
    each, and scales [n / 16, k / 64, 16] in bf16."""
    rows, columns = _padded(*weights.shape)
    full = np.zeros((rows, columns), np.float32)
    full[: len(weights), : weights.shape[1]] = weights
    groups = full.reshape(rows, columns // GROUP, GROUP)
    scales = np.maximum(np.abs(groups).max(axis=2), np.float32(1e-30)) / np.float32(7)
    bits = (scales.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)
    rounded = (bits << np.uint32(16)).view(np.float32)
    numbers = (np.clip(np.rint(groups / rounded[..., None]), -8, 7) + 8).astype(np.uint8)
    steps = numbers.reshape(rows // BLOCK, BLOCK, columns // 8, 2, 4).transpose(0, 2, 3, 1, 4)
    packed = steps[:, :, 0] | steps[:, :, 1] << np.uint8(4)  # [n / 16, k / 8, 16, 4]
    by_block = bits.astype(np.uint16).reshape(rows // BLOCK, BLOCK, -1).transpose(0, 2, 1)
    return packed.reshape(rows // BLOCK, columns // 8, 64), np.ascontiguousarray(by_block)


def _padded(rows: int, columns: int) -> tuple[int, int]:
    return -rows // BLOCK * -BLOCK, -columns // GROUP * -GROUP


@cache
def _add_rows() -> Any:
    """The kernel, where it can be called with arrays."""
    found = load("kernels", ("foregate_add_rows",))
    return None if found is None or calls() is None else function(found, "foregate_add_rows", 7)


@cache
def _linear() -> Any:
    found = load("kernels", ("foregate_linear",))
    if found is None:
        return None
    function = found.foregate_linear
    function.argtypes = [POINTER(Matrix), c_void_p, c_int, c_int, c_int, c_void_p, c_int, c_int, c_int]
    return function
