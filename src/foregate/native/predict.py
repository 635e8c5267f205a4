"""What trained predictors compute for a token and layer, each in one compiled call (``native/predict.h``). No torch.

Shapes: L layers, E experts, D hidden, H hops that were trained, A of them asked for, R width of a network.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int32, c_void_p
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.native.asking import WORTH_BEGINNING, Ask, Begun, Told, checked
from foregate.native.library import load
from foregate.native.matrix import Matrix, RowsOf, threads_asked
from foregate.native.products import Products, Rows
from foregate.types import Prediction

Floats = NDArray[np.float32]

ACTIVATIONS = ("silu", "gelu")
"""As predict.h numbers them."""


class _Network(ctypes.Structure):
    """``network`` of predict.h."""

    _fields_ = [
        *((name, Matrix) for name in ("first", "second")),
        *((name, c_void_p) for name in ("first_bias", "second_bias")),
        *((name, c_int32) for name in ("activation", "experts", "named")),
    ]


class _Fusion(ctypes.Structure):
    """``fusion`` of predict.h."""

    _fields_ = [
        ("dense", Matrix),
        ("outward", Matrix),
        ("routers", c_void_p),
        ("picked", RowsOf),
        ("base", c_void_p),
        *((name, c_void_p) for name in ("repeats", "bias")),
        *((name, c_int32) for name in ("hops", "asked", "width", "hidden", "experts")),
    ]


class _State(ctypes.Structure):
    """``fusion_state`` of predict.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("now", "last", "ids", "weights", "counts")),
        *((name, c_int32) for name in ("layer", "layers", "chosen", "named")),
    ]


def available() -> bool:
    """Whether the kernels are there, and not built from an older source."""
    return _library() is not None


class NetworkKernel:
    """second act(first x + first_bias) + second_bias, of every layer: ``first`` L of [R, K], ``second`` L of [E, R].

    Biases [L, R] and [L, E] are float32; ``experts`` [L] says how many of the E each layer has, of which ``named`` are
    told, or all.
    """

    def __init__(
        self,
        products: tuple[Products, Products],
        biases: tuple[Floats, Floats],
        activation: str,
        experts: Sequence[int],
        named: int,
    ) -> None:
        (first, second), code = products, ACTIVATIONS.index(activation)
        self._kept = products, biases
        told = [min(there, named) for there in experts]
        parts = zip(first.matrices, second.matrices, *biases, experts, told, strict=True)
        self._layers = [
            _Network(one, other, _pointer(bias), _pointer(last), code, *counts)
            for one, other, bias, last, *counts in parts
        ]
        self._given = [ctypes.addressof(layer) for layer in self._layers]
        self.x = np.zeros(first.matrices[0].columns, np.float32)
        """The input: written to before a call."""
        self._told = [Told(1, named, [(layer, there)]) for layer, there in enumerate(experts)]
        known = [(given, _pointer(self.x)) for given in self._given]
        pairs = zip(self._told, known, strict=True)
        self._ask = [told.asked_of(_loaded(), "foregate_predict_network", *at) for told, at in pairs]

    def __call__(self, layer: int) -> list[Prediction]:
        """``layer`` itself, its experts for ``x``, the best first, and their scores."""
        return checked(self._ask[layer](threads_asked() or 1))


class FusionKernel:
    """``predictors.fusion.Fusion``'s scores. Matrices L of [R, (2 + H) D] (``dense``), of [A (D + E), R] (``outward``)
    and L A of [E, D] (``routers``); rows L of [E, 2 R + A D] (``picked``) and L A of [E, E] (``repeat``); ``base``
    [L, 2 R + A D] and ``bias`` [L, A, E]. ``state``: ``now`` and ``last``, residuals [L, D] of this token and the one
    before, ``ids`` and ``weights`` [L, K] of the chosen, and what else must outlive a question; a call fills ``now``,
    and those if it is told. All numbers are float32, ids int64 (negative: none). ``experts`` [L] says how many of the E
    each layer has, of which ``named`` are told, or all; ``ahead`` [L] which layers are told at each.
    """

    def __init__(
        self,
        products: tuple[Products, Products, Products],
        rows: tuple[Rows, Rows],
        biases: tuple[Floats, Floats],
        state: tuple[Floats, Floats, NDArray[np.int64], Floats, Floats],
        experts: Sequence[int],
        ahead: Sequence[Sequence[int]],
        hops: int,
        named: int,
    ) -> None:
        (dense, outward, routers), (picked, repeat), (base, bias) = products, rows, biases
        layers, asked, most = bias.shape
        hidden, width = len(routers.x), dense.outputs
        named = min(named, most)
        self._routers = (Matrix * len(routers.matrices))(*routers.matrices)
        self._repeats = (RowsOf * len(repeat.given))(*repeat.given)
        self._counts = np.array(experts, np.int32)
        self._kept = products, rows, biases, state
        self._large = dense.nbytes + outward.nbytes + asked * routers.nbytes >= WORTH_BEGINNING
        self._layers = [
            _Fusion(
                dense.matrices[n], outward.matrices[n], _part(self._routers, n * asked), picked.given[n],
                _pointer(base[n]), _part(self._repeats, n * asked), _pointer(bias[n]), hops, asked, width, hidden, most,
            )
            for n in range(layers)
        ]  # fmt: skip
        at = [array.ctypes.data for array in (*state[:4], self._counts)]
        self._states = [_State(*at, n, layers, state[2].shape[1], named) for n in range(layers)]
        jobs = zip(self._layers, self._states, strict=True)
        known = [(ctypes.addressof(layer), ctypes.addressof(state)) for layer, state in jobs]
        kept = self._kept, self._layers, self._states, self._routers, self._repeats, self._counts

        def asker(layer: int) -> Ask:
            told = Told(asked, named, [(m, experts[m % layers]) for m in ahead[layer]])
            return told.asked_of(_loaded(), "foregate_predict_fusion", *known[layer], given=5, kept=kept)

        self._asker = asker
        self._ask = [asker(layer) for layer in range(layers)]

    def __call__(
        self, layer: int, places: tuple[int, ...], dtype: int, chosen: tuple[int | None, int | None] = (None, None)
    ) -> list[Prediction]:
        """Layers after ``layer``, experts of each, the best first, and their scores. ``places``: where the residual
        and the pre-attention input lie, [D] numbers of ``dtype`` each; ``chosen``: where what the layer chose does,
        [K] like rows of ``ids`` and ``weights``, unless they have it."""
        return checked(self._free(layer)(*places, dtype, *chosen, threads_asked() or 1))

    def begin(
        self, layer: int, places: tuple[int, ...], dtype: int, chosen: tuple[int | None, int | None] = (None, None)
    ) -> Callable[[], list[Prediction]]:
        """As a call, but what this returns tells, and another compute thread does it meanwhile if it is worth it. What
        lies at the ``places`` stays there until then."""
        ask = self._free(layer)
        begun = Begun(ask)
        ask.begin(*places, dtype, *chosen, (threads_asked() or 1) if self._large else 1)
        return lambda: checked(begun())

    def _free(self, layer: int) -> Ask:
        """Who asks: another where a question is open, which must be of the same choice."""
        ask = self._ask[layer]
        return self._asker(layer) if ask.open else ask


def _part(array: ctypes.Array[Any], number: int) -> int:
    return ctypes.addressof(array) + number * ctypes.sizeof(array) // len(array)


def _pointer(array: Floats) -> int:
    assert array.flags.c_contiguous
    assert array.dtype == np.float32
    return array.ctypes.data


def _loaded() -> Any:
    found = _library()
    assert found is not None
    return found


@cache
def _library() -> Any:
    return load("kernels", ("foregate_predict_network", "foregate_predict_fusion"))
