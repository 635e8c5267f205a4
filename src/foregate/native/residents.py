"""Where the experts of a layer are resident, for ``DecoderLayer``: once it has routed, it has those begun at once.

Shapes: E experts of the layer, S slots.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_uint64, c_void_p

import numpy as np
from numpy.typing import NDArray


class _Residents(ctypes.Structure):
    """``residents`` of layer.h."""

    _fields_ = [
        ("slots", c_void_p),
        ("experts", c_void_p),
        ("on", c_void_p),
        ("hidden", c_int64),
        ("begun", c_uint64),
        ("number", c_int64),
    ]


class Residents:
    """``slots`` [E] is where each expert of a layer is resident, or -1; ``experts`` [S] where what lies in a slot is
    told of (``FusedExpert.at``), or 0 as long as nobody has said; ``on`` [1] whether to begin anything; ``hidden``
    numbers lie between the matrices of an expert. Others write to the arrays; layers of one form share all but the
    first."""

    def __init__(
        self, slots: NDArray[np.int32], experts: NDArray[np.uint64], on: NDArray[np.int32], hidden: int
    ) -> None:
        self._kept = slots, experts, on
        self._experts = experts
        self._told = _Residents(slots.ctypes.data, experts.ctypes.data, on.ctypes.data, hidden)
        self.at = ctypes.addressof(self._told)
        self.hidden = hidden

    @property
    def begun(self) -> int:
        """Bit i: the i-th of the chosen was begun when the layer was called last."""
        found: int = self._told.begun
        return found

    @property
    def number(self) -> int:
        """Of what was begun: nobody else ends it."""
        found: int = self._told.number
        return found

    def tell(self, slot: int, at: int) -> None:
        """What lies in ``slot`` as this layer's expert is told of there."""
        self._experts[slot] = at
