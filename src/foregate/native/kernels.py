"""The compiled kernels (``native/kernels.c``) by ctypes: matrices, one expert, memory reading. None where not built.

Shapes: T tokens, D hidden, F expert hidden, N rows, K columns.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_int32, c_size_t, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from foregate.errors import IntegrityError
from foregate.native.library import load

MOST_TOKENS = 8
"""Tokens up to which the kernels run; more are cheaper as one product of matrices."""

MOST_COLUMNS = 65536
"""Integer sums of longer rows could overflow."""

_BF16, _INT8, _INT4, _F32 = range(4)
_FORMATS = {torch.bfloat16: _BF16, torch.int8: _INT8, torch.uint8: _INT4}
ACTIVATIONS = {torch.bfloat16: _BF16, torch.float32: _F32}
"""Dtypes of inputs and outputs."""


_threads: int | None = None


def use_threads(threads: int | None) -> None:
    """Threads of the kernels from now on; None: as many as torch has."""
    global _threads
    _threads = threads


def num_threads() -> int:
    """Threads that the kernels compute with. Their results do not depend on it."""
    return _threads or torch.get_num_threads()


class Matrix(ctypes.Structure):
    """``matrix`` of kernels.c. Holds no reference: whoever makes one keeps the tensors."""

    _fields_ = [
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("dtype", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("group", c_int32),
    ]


def matrix(values: Tensor, scales: Tensor | None) -> Matrix:
    """``values`` as ``checkpoint.quantise`` stores them, or bf16 [N, K]. Raises KeyError for another dtype."""
    kind = _FORMATS[values.dtype]
    if kind == _INT4:
        assert scales is not None
        rows, columns = values.shape[0] * 16, values.shape[1] * 8
        return Matrix(values.data_ptr(), scales.data_ptr(), kind, rows, columns, columns // scales.shape[1])
    pointer = None if scales is None else scales.data_ptr()
    return Matrix(values.data_ptr(), pointer, kind, values.shape[0], values.shape[1], 0)


@cache
def library() -> ctypes.CDLL | None:
    """The kernels with their signatures, or None: then torch computes."""
    found = load("kernels")
    if found is None:
        return None
    pointer: Any = POINTER(Matrix)
    tail: list[Any] = [c_int, c_void_p, c_int, c_int, c_int, c_void_p, c_int, c_int, c_int]
    found.foregate_expert.argtypes = [pointer, pointer, pointer, *tail]
    found.foregate_linear.argtypes = [pointer, *tail[1:]]
    found.foregate_expand.argtypes = [pointer, c_void_p, c_int, c_int, c_int]
    found.foregate_read.argtypes = [c_void_p, c_size_t, c_int]
    found.foregate_read.restype = c_uint64
    found.foregate_kernels.argtypes = [c_int]
    found.foregate_kernels.restype = c_char_p
    return found


def instructions() -> str:
    """Which instructions the kernels use on this processor; ``torch`` where there are no kernels."""
    found = library()
    return "torch" if found is None else str(found.foregate_kernels(-1).decode())


class FusedExpert:
    """One expert in a slot: down(silu(gate x) · up x), for up to ``MOST_TOKENS`` tokens. Raises as ``matrix``."""

    def __init__(
        self, gate_up: Tensor, gate_up_scale: Tensor | None, down: Tensor, down_scale: Tensor | None, hidden: int
    ) -> None:
        found = library()
        assert found is not None
        self._kept = (gate_up, gate_up_scale, down, down_scale)
        gate, up = gate_up.chunk(2)
        scales = (None, None) if gate_up_scale is None else gate_up_scale.chunk(2)
        self._parts = tuple(matrix(*pair) for pair in ((gate, scales[0]), (up, scales[1]), (down, down_scale)))
        self._hidden = hidden
        self._run = found.foregate_expert

    def __call__(self, x: Tensor) -> Tensor:
        """Output [T, D] for ``x`` [T, D], in the dtype of ``x`` (see ``ACTIVATIONS``)."""
        tokens, width = x.shape
        x = x.contiguous()
        out = torch.empty_like(x)
        kind = ACTIVATIONS[x.dtype]
        threads = num_threads()
        code = self._run(
            *self._parts, self._hidden, x.data_ptr(), width, kind, tokens, out.data_ptr(), width, kind, threads
        )
        _check(code)
        return out


def linear(weight: Matrix, x: Tensor, width: int) -> Tensor:
    """Output [T, width] = x [T, K] · weightᵀ in the dtype of ``x``, for up to ``MOST_TOKENS`` tokens."""
    found = library()
    assert found is not None
    x = x.contiguous()
    out = x.new_empty(len(x), width)
    kind, threads = ACTIVATIONS[x.dtype], num_threads()
    _check(found.foregate_linear(weight, x.data_ptr(), x.shape[1], kind, len(x), out.data_ptr(), width, kind, threads))
    return out


def expand(weight: Matrix, out: Tensor) -> Tensor:
    """Write the first rows and columns of an int8 or int4 ``weight`` to ``out`` (bf16, contiguous, [N, K])."""
    found = library()
    assert found is not None
    rows, width = out.shape
    _check(found.foregate_expand(weight, out.data_ptr(), rows, width, num_threads()))
    return out


def _check(code: int) -> None:
    if code == 2:
        raise MemoryError("no memory for the inputs of an expert")
    if code:
        raise IntegrityError("the kernels refused the shape or the dtype of a matrix")
