"""Matrices times one vector for predictors: bf16 by the compiled kernels, float32 by numpy without them. No torch.

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
from foregate.native.library import load
from foregate.native.matrix import BF16, F32, MOST_COLUMNS, Matrix, threads_asked

Floats = NDArray[np.float32]

WORTH_A_THREAD = 1 << 20
"""Bytes of a matrix from which on a second thread is woken for it."""


class Products:
    """``weights`` [L, N, K], float32, rounded to bf16 (half of the memory and of the time) where the kernels are.

    ``x`` [K] is the input: write to it, then ask for a matrix. Outputs are those of the caller until the next call.
    """

    def __init__(self, weights: Floats) -> None:
        count, outputs, inputs = weights.shape
        self.x = np.zeros(inputs, np.float32)
        self._out = np.zeros(outputs, np.float32)
        self._run = _linear() if 0 < inputs <= MOST_COLUMNS and outputs else None
        self.matrices: list[Matrix] = []
        """For the kernels; none where numpy multiplies. They hold no reference to the weights, ``self`` does."""
        if self._run is None:
            self._weights: NDArray[Any] = np.ascontiguousarray(weights, np.float32)
            return
        self._weights = np.empty(weights.shape, np.uint16)
        for number in range(count):
            self._weights[number] = to_bf16(weights[number])
        size = self._weights[0].nbytes if count else 0
        start = self._weights.ctypes.data
        self._large = size >= WORTH_A_THREAD
        self.matrices = [Matrix(start + n * size, None, BF16, outputs, inputs, 0) for n in range(count)]
        self._given = [ctypes.byref(matrix) for matrix in self.matrices]
        self._from, self._to = self.x.ctypes.data, self._out.ctypes.data

    @property
    def size(self) -> int:
        """Numbers of one matrix, and ``nbytes``, its bytes as they lie in memory."""
        return len(self.x) * len(self._out)

    @property
    def nbytes(self) -> int:
        """See ``size``."""
        return self.size * self._weights.itemsize

    def of(self, number: int) -> Floats:
        """Matrix ``number`` times ``x``, [N]: overwritten by the next call."""
        if self._run is None:
            return np.matmul(self._weights[number], self.x, out=self._out)
        inputs, outputs = len(self.x), len(self._out)
        threads = (threads_asked() or 1) if self._large else 1
        if self._run(self._given[number], self._from, inputs, F32, 1, self._to, outputs, F32, threads):
            raise IntegrityError(f"the kernels refused a matrix of {outputs} x {inputs}")
        return self._out

    def __call__(self, number: int, x: Floats) -> Floats:
        """Matrix ``number`` times ``x`` [K], [N]: overwritten by the next call."""
        self.x[:] = x
        return self.of(number)


def to_bf16(values: Floats) -> NDArray[np.uint16]:
    """The upper halves of finite float32 ``values``, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


@cache
def _linear() -> Any:
    found = load("kernels", ("foregate_linear",))
    if found is None:
        return None
    function = found.foregate_linear
    function.argtypes = [POINTER(Matrix), c_void_p, c_int, c_int, c_int, c_void_p, c_int, c_int, c_int]
    return function
