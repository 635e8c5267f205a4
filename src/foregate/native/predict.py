"""What trained predictors compute for a token and layer, each in one compiled call (``native/predict.h``). No torch.

Shapes: L layers, E experts, D hidden, H hops that were trained, A of them asked for, R width of a network.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.native.asking import WORTH_BEGINNING, Ask, LayerKernel, Place, Told
from foregate.native.library import load
from foregate.native.matrix import F32, Matrix, RowsOf
from foregate.native.products import Products, Rows

Floats = NDArray[np.float32]
Given = Floats | tuple[int, int] | None
Picked = tuple[NDArray[np.int64], Floats | None]
Chosen = tuple[int | None, int | None]

ACTIVATIONS = ("linear", "relu", "silu", "gelu")
"""As predict.h numbers them."""


class _Stage(ctypes.Structure):
    """``stage`` of predict.h."""

    _fields_ = [("weights", Matrix), ("bias", c_void_p), ("activation", c_int32)]


class _Network(ctypes.Structure):
    """``network`` of predict.h."""

    _fields_ = [
        ("picked", RowsOf),
        *((name, c_void_p) for name in ("start", "norms", "stages", "counts")),
        *(
            (name, c_int32)
            for name in ("in_turn", "apart", "rows", "entry", "given", "depth", "hops", "experts", "named")
        ),
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


@dataclass(frozen=True)
class Stage:
    """weights act(x) + ``bias``: ``products`` of each layer or, if it is one, of all; ``bias`` [L or 1, N] likewise."""

    products: Products
    bias: Floats
    activation: str

    def __call__(self, layer: int, x: Floats) -> Floats:
        """What comes out for ``x`` [K], which the activation has seen."""
        products, last = self.products, len(self.bias) - 1
        out: Floats = products(min(layer, products.count - 1), x) + self.bias[min(layer, last)]
        return out

    def of(self, layer: int) -> _Stage:
        matrices, last = self.products.matrices, len(self.bias) - 1
        matrix = matrices[min(layer, len(matrices) - 1)]
        return _Stage(matrix, pointer(self.bias[min(layer, last)]), ACTIVATIONS.index(self.activation))


class NetworkKernel(LayerKernel):
    """Scores [H, E] of the layers ``ahead`` [L] of each: of what is given and of the ``picked`` rows [N], added to
    ``start`` [L, N] (None: nothing, zeros), by one stage after the other. Without stages N is H E. With ``norms``
    [L, n, N / n] a vector [N / n] is given, divided by its root mean square and multiplied with each.

    ``rows`` has one matrix, or one for each layer; with ``turns`` (n, m) those after each n that are picked are meant m
    further on. ``experts`` [L] says how many of the E each layer has, of which ``named`` are told, or all.

    Given are: numbers, float32, or their address and format; and which rows are picked, int64 (those that do not exist
    are passed over), with the factor of each, float32 (None: 1). All arrays are in one piece.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        experts: Sequence[int],
        ahead: Sequence[Sequence[int]],
        hops: int,
        named: int,
        *,
        rows: Rows | None = None,
        start: Floats | None = None,
        norms: Floats | None = None,
        turns: tuple[int, int] = (0, 0),
    ) -> None:
        layers, most = len(experts), max(experts)
        entry = len(stages[0].products.x) if stages else hops * most
        self._named, self._hops, self._ahead, self.experts = min(named, most), hops, ahead, experts
        nbytes = sum(stage.products.nbytes for stage in stages)
        self._large = nbytes >= WORTH_BEGINNING // 4  # one stage waits for the other
        self._stages = [(_Stage * max(1, len(stages)))(*[s.of(layer) for s in stages]) for layer in range(layers)]
        self._counts = np.ones((layers, hops), np.int32)  # of hops that nobody asks for: any
        for layer, targets in enumerate(ahead):
            self._counts[layer, : len(targets)] = [experts[target % layers] for target in targets]
        given, count = (rows.given, rows.count) if rows is not None else ([], 0)
        taken = entry if norms is None else norms.shape[-1]
        self._networks = [
            _Network(
                given[min(n, len(given) - 1)] if given else RowsOf(),
                *(None if one is None else pointer(one[n]) for one in (start, norms)),
                ctypes.addressof(self._stages[n]), self._counts[n].ctypes.data, *turns, count,
                entry, taken, len(stages), hops, most, self._named,
            )
            for n in range(layers)
        ]  # fmt: skip
        self._kept = tuple(stages), rows, start, norms
        self._ask = [self._asker(layer) for layer in range(layers)]

    def _arguments(self, given: Given, picked: Picked | None) -> tuple[Place, ...]:
        at, dtype = given if isinstance(given, tuple) else (given, F32)
        if picked is None:
            return at, dtype, None, None, 0
        return at, dtype, *picked, picked[0].size

    def _asker(self, layer: int) -> Ask:
        return self.asker(layer, "foregate_predict_network", self.place(layer), given=5)

    def asker(self, layer: int, kernel: str, *known: int, given: int, kept: object = None) -> Ask:
        """Asks ``kernel``, which answers as this network at ``layer`` would. See ``Told.asked_of``."""
        layers = len(self.experts)
        parts = [(target, self.experts[target % layers]) for target in self._ahead[layer]]
        told = Told(self._hops, self._named, parts)
        mine = self._kept, self._networks, self._stages, self._counts
        return told.asked_of(loaded(), kernel, *known, given=given, kept=(mine, kept))

    def place(self, layer: int) -> int:
        """Where the network of ``layer`` lies, as long as this one lives."""
        return ctypes.addressof(self._networks[layer])


class FusionKernel(LayerKernel):
    """``predictors.fusion.Fusion``'s scores. Matrices L of [R, (2 + H) D] (``dense``), of [A (D + E), R] (``outward``)
    and L A of [E, D] (``routers``); rows L of [E, 2 R + A D] (``picked``) and L A of [E, E] (``repeat``); ``base``
    [L, 2 R + A D] and ``bias`` [L, A, E]. ``state``: ``now`` and ``last``, residuals [L, D] of this token and the one
    before, ``ids`` and ``weights`` [L, K] of the chosen, and what else must outlive a question; a call fills ``now``,
    and those if it is told. All numbers are float32, ids int64 (negative: none). ``experts`` [L] says how many of the E
    each layer has, of which ``named`` are told, or all; ``ahead`` [L] which layers are told at each.

    Given are: where the residual and the pre-attention input lie, [D] numbers each; their format; and where what the
    layer chose does, [K] like rows of ``ids`` and ``weights``, unless they have it. A question that is open and another
    are of the same choice, and one that is given it ends before one that is not.
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
                pointer(base[n]), _part(self._repeats, n * asked), pointer(bias[n]), hops, asked, width, hidden, most,
            )
            for n in range(layers)
        ]  # fmt: skip
        at = [array.ctypes.data for array in (*state[:4], self._counts)]
        self._states = [_State(*at, n, layers, state[2].shape[1], named) for n in range(layers)]
        self._told = asked, named
        self._parts = [[(m, experts[m % layers]) for m in further] for further in ahead]
        self._ask = [self._asker(layer) for layer in range(layers)]

    def _arguments(self, places: tuple[int, int], dtype: int, chosen: Chosen) -> tuple[Place, ...]:
        return *places, dtype, *chosen

    def _asker(self, layer: int) -> Ask:
        known = ctypes.addressof(self._layers[layer]), ctypes.addressof(self._states[layer])
        kept = self._kept, self._layers, self._states, self._routers, self._repeats, self._counts
        told = Told(*self._told, self._parts[layer])
        return told.asked_of(loaded(), "foregate_predict_fusion", *known, given=5, kept=kept)


def _part(array: ctypes.Array[Any], number: int) -> int:
    return ctypes.addressof(array) + number * ctypes.sizeof(array) // len(array)


def pointer(array: Floats) -> int:
    assert array.flags.c_contiguous
    assert array.dtype == np.float32
    return array.ctypes.data


def loaded() -> Any:
    found = _library()
    assert found is not None
    return found


@cache
def _library() -> Any:
    asked = [f"foregate_predict_{name}" for name in ("network", "fusion", "lstm", "encoder", "match")]
    return load("kernels", [*asked, "foregate_step_gru"])
