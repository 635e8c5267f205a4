"""What trained predictors compute for a token and layer, each in one compiled call (``native/predict.h``). No torch.

Shapes: L layers, E experts, D hidden, H hops that were trained, A of them asked for, R width of a network.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_int, c_int32, c_void_p
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.errors import IntegrityError
from foregate.native.library import load
from foregate.native.matrix import Matrix, threads_asked
from foregate.native.products import Products

Floats = NDArray[np.float32]

ACTIVATIONS = ("silu", "gelu")
"""As predict.h numbers them."""


class _Network(ctypes.Structure):
    """``network`` of predict.h."""

    _fields_ = [
        *((name, Matrix) for name in ("first", "second")),
        *((name, c_void_p) for name in ("first_bias", "second_bias")),
        ("activation", c_int32),
    ]


class _Fusion(ctypes.Structure):
    """``fusion`` of predict.h."""

    _fields_ = [
        *((name, Matrix) for name in ("dense", "outward")),
        *((name, c_void_p) for name in ("routers", "picked", "base", "bias", "repeat")),
        *((name, c_int32) for name in ("hops", "asked", "width", "hidden", "experts")),
    ]


class _State(ctypes.Structure):
    """``fusion_state`` of predict.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("now", "last", "chosen")),
        *((name, c_int32) for name in ("layer", "layers")),
    ]


def available() -> bool:
    """Whether the kernels are there, and not built from an older source."""
    return _library() is not None


class NetworkKernel:
    """second act(first x + first_bias) + second_bias, of every layer: ``first`` L of [R, K], ``second`` L of [E, R].

    Biases [L, R] and [L, E] are float32.
    """

    def __init__(
        self, first: Products, second: Products, first_bias: Floats, second_bias: Floats, activation: str
    ) -> None:
        self._kept = first, second, first_bias, second_bias
        code = ACTIVATIONS.index(activation)
        self._layers = [
            _Network(one, other, _pointer(bias), _pointer(last), code)
            for one, other, bias, last in zip(first.matrices, second.matrices, first_bias, second_bias, strict=True)
        ]
        self._given = [ctypes.byref(layer) for layer in self._layers]
        self.x = np.zeros(first.matrices[0].columns, np.float32)
        """The input: written to before a call."""
        self._out = np.zeros(second.matrices[0].rows, np.float32)
        self._from, self._to = _pointer(self.x), _pointer(self._out)
        self._run = _loaded().foregate_network

    def __call__(self, layer: int) -> Floats:
        """Scores [E] of ``layer`` for ``x``: overwritten by the next call."""
        _check(self._run(self._given[layer], self._from, self._to, threads_asked() or 1))
        return self._out


class FusionKernel:
    """``predictors.fusion.Fusion``'s scores. Matrices L of [R, (2 + H) D] (``dense``), L of [A (D + E), R]
    (``outward``) and L A of [E, D] (``routers``); ``picked`` [L, E, 2 R + A D], ``base`` [L, 2 R + A D], ``bias``
    [L, A, E], ``repeat`` [L, A, E, E]; ``now`` and ``last``, residuals [L, D] of this token and the one before, and
    ``chosen`` [L, E], all float32 and written to by their owner.
    """

    def __init__(
        self,
        dense: Products,
        outward: Products,
        routers: Products,
        tables: Sequence[Floats],
        state: Sequence[Floats],
        hops: int,
    ) -> None:
        self._kept = dense, outward, routers, tables, state
        picked, base, bias, repeat = tables
        layers, asked, experts = bias.shape
        hidden, width = routers.matrices[0].columns, dense.matrices[0].rows
        self._routers = (Matrix * len(routers.matrices))(*routers.matrices)
        at, size = ctypes.addressof(self._routers), asked * ctypes.sizeof(Matrix)
        self._layers = [
            _Fusion(
                dense.matrices[n], outward.matrices[n], at + n * size,
                *(_pointer(table[n]) for table in (picked, base, bias, repeat)),
                hops, asked, width, hidden, experts,
            )
            for n in range(layers)
        ]  # fmt: skip
        self._given = [ctypes.byref(layer) for layer in self._layers]
        self._states = [_State(*map(_pointer, state), layer, layers) for layer in range(layers)]
        # Arrays of its own: asking numpy for the address of another takes as long as copying it.
        self._before, self._weights = np.zeros(hidden, np.float32), np.zeros(experts, np.float32)
        self._ids, self._out = np.zeros(experts, np.int64), np.zeros((asked, experts), np.float32)
        self._at = self._before.ctypes.data, self._ids.ctypes.data, self._weights.ctypes.data
        self._to = _pointer(self._out)
        self._run = _loaded().foregate_fusion

    def __call__(self, layer: int, before: Floats, ids: NDArray[np.int64], weights: Floats) -> Floats:
        """Scores [A, E] from the pre-attention input ``before`` [D] and what ``layer`` chose: overwritten by the next
        call."""
        count = len(ids)
        self._before[:] = before
        self._ids[:count], self._weights[:count] = ids, weights
        given, state = self._given[layer], self._states[layer]
        code = self._run(given, state, *self._at, count, self._to, threads_asked() or 1)
        _check(code)
        return self._out


def _pointer(array: Floats) -> int:
    assert array.flags.c_contiguous
    assert array.dtype == np.float32
    return array.ctypes.data


def _check(code: int) -> None:
    if code == 2:
        raise MemoryError("no memory for a prediction")
    if code:
        raise IntegrityError("the kernels refused the arrays of a predictor")


def _loaded() -> Any:
    found = _library()
    assert found is not None
    return found


@cache
def _library() -> Any:
    found = load("kernels", ("foregate_network", "foregate_fusion"))
    if found is None:
        return None
    found.foregate_network.argtypes = [POINTER(_Network), c_void_p, c_void_p, c_int]
    found.foregate_fusion.argtypes = [
        POINTER(_Fusion), POINTER(_State), c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_int
    ]  # fmt: skip
    return found
