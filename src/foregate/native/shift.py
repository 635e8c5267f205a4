"""What a predictor adds to a hidden state before a router is asked ahead (``native/route.h``). No torch."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_void_p

import numpy as np
from numpy.typing import NDArray

from foregate.native.matrix import RowsOf
from foregate.native.products import Floats, Rows


class _Shift(ctypes.Structure):
    """``shift`` of route.h."""

    _fields_ = [
        ("picked", RowsOf),
        *((name, c_void_p) for name in ("base", "ids", "weights")),
        *((name, c_int32) for name in ("count", "known", "width")),
    ]


class Shift:
    """Of a layer: ``base`` [L, D] and the ``rows`` [L, E, D] of the experts ``ids`` [k], each times its weight [k].

    ``ids`` (int64) and ``weights`` (float32) are written by their owner, or lie elsewhere (``read``); an id of no
    expert adds nothing.
    """

    def __init__(self, rows: Rows, base: Floats, ids: NDArray[np.int64], weights: Floats) -> None:
        self._kept = rows, base, ids, weights
        at, sizes = (ids.ctypes.data, weights.ctypes.data), (len(ids), rows.count, rows.columns)
        self._layers = [
            _Shift(given, added.ctypes.data, *at, *sizes) for given, added in zip(rows.given, base, strict=True)
        ]
        self._places = [ctypes.addressof(layer) for layer in self._layers]

    def read(self, layer: int, ids: int, weights: int) -> None:
        """From now on those of ``layer`` are [k] numbers at these addresses; whoever asks sees to it that they are."""
        shift = self._layers[layer]
        shift.ids, shift.weights = ids, weights

    def place(self, layer: int) -> int:
        """Where the shift of ``layer`` lies, as long as this one lives."""
        return self._places[layer]
