"""What every caller of the kernels shares, torch or not: the form of a matrix, and how many threads compute."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_void_p

BF16, INT8, INT4, F32 = range(4)
"""Formats, as kernels.c numbers them."""

MOST_COLUMNS = 65536
"""Integer sums of longer rows could overflow."""


class Matrix(ctypes.Structure):
    """``matrix`` of kernels.c. Holds no reference: whoever makes one keeps the weights."""

    _fields_ = [
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("dtype", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("group", c_int32),
    ]


class RowsOf(ctypes.Structure):
    """``rows`` of rows.h. Holds no reference either."""

    _fields_ = [("values", c_void_p), ("scales", c_void_p)]


_threads: int | None = None


def use_threads(threads: int | None) -> None:
    """Threads of the kernels from now on; None: as their caller thinks fit."""
    global _threads
    _threads = threads


def threads_asked() -> int | None:
    """What ``use_threads`` was told last."""
    return _threads
