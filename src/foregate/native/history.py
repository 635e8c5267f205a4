"""What comes before the head, a network, in ``predictors/history.py`` and ``sequence.py``, compiled
(``native/history.h``). No torch.

Shapes: L layers, E experts, K of them chosen, W window, d width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_void_p
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foregate.native.asking import WORTH_BEGINNING, Ask, LayerKernel, Place, refuse
from foregate.native.library import function
from foregate.native.matrix import Matrix, RowsOf
from foregate.native.predict import Floats, NetworkKernel, Stage, loaded, pointer
from foregate.native.products import Products, Rows

MOST_STATE = 4096
"""Width of an encoder, at most."""

_MATRICES = ("qkv", "out", "up", "down")


class _Lstm(ctypes.Structure):
    """``lstm`` of history.h."""

    _fields_ = [
        ("picked", RowsOf),
        ("biases", c_void_p * 2),
        ("again", Matrix * 2),
        ("second", Matrix),
        *((name, c_void_p) for name in ("ids", "there", "states", "stamps")),
        *((name, c_int32) for name in ("width", "chosen", "experts", "layers")),
    ]


class _Gru(ctypes.Structure):
    """``gru`` of history.h."""

    _fields_ = [
        *((name, Matrix) for name in ("input", "again", "toward")),
        ("biases", c_void_p * 2),
        ("state", c_void_p),
        ("width", c_int32),
    ]


class _Block(ctypes.Structure):
    """``encoder_block`` of history.h."""

    _fields_ = [
        *((name, Matrix) for name in _MATRICES),
        *((f"{name}_bias", c_void_p) for name in _MATRICES),
        *((name, c_void_p) for name in ("norm1", "norm1_bias", "norm2", "norm2_bias")),
    ]


class _Encoder(ctypes.Structure):
    """``encoder`` of history.h."""

    _fields_ = [
        ("embed", RowsOf),
        *((name, c_void_p) for name in ("positions", "ids", "there")),
        ("blocks", _Block * 2),
        *((name, c_int32) for name in ("window", "width", "heads", "chosen", "experts", "layers")),
    ]


@dataclass(frozen=True)
class EncoderBlock:
    """Attention and feed-forward of width d, each added and normed afterwards; ``norms``: weight, bias [d] of both."""

    qkv: Stage
    out: Stage
    up: Stage
    down: Stage
    norms: Sequence[Floats]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All matrices."""
        return self.qkv, self.out, self.up, self.down


class _Headed(LayerKernel):
    """Asks a kernel of its own, which asks that of ``head`` at the end."""

    def __init__(self, head: NetworkKernel, products: Sequence[Products]) -> None:
        self._head = head
        self._there = np.array(head.experts, np.int32)
        self._large = sum(part.nbytes for part in products) >= WORTH_BEGINNING // 4


class LstmKernel(_Headed):
    """``head`` on the state after a layer. ``picked`` [1, E, 4 d] are what an expert adds to the gates; ``products``
    [4 d, d] are of both layers' own state and of the second's input. ``states`` [L, 2, 2, d] of the tokens ``stamps``
    [L] are filled, from ``ids`` [L, K]. Given are the stamp, not 0, of the token and where what the layer chose lies,
    [K], which goes to ``ids``, unless that has it. Questions share the states: what is open is of the same token, and
    one that is given a choice ends before one that is not.
    """

    def __init__(
        self,
        head: NetworkKernel,
        picked: Rows,
        biases: Sequence[Floats],
        products: tuple[Products, Products, Products],
        ids: NDArray[np.int64],
        states: Floats,
        stamps: NDArray[np.int64],
    ) -> None:
        super().__init__(head, products)
        first, *others = (part.matrices[0] for part in products)
        self._lstm = _Lstm(
            picked.given[0], (c_void_p * 2)(*map(pointer, biases)), (Matrix * 2)(first, others[0]), others[1],
            ids.ctypes.data, self._there.ctypes.data, pointer(states), stamps.ctypes.data,
            states.shape[-1], ids.shape[1], picked.count, len(states),
        )  # fmt: skip
        self._mine = self._lstm, picked, tuple(biases), products, ids, self._there, states, stamps
        self._ask = [self._asker(layer) for layer in range(len(states))]

    def _arguments(self, stamp: int, choice: int | None) -> tuple[Place, ...]:
        return stamp, choice

    def _asker(self, layer: int) -> Ask:
        known = ctypes.addressof(self._lstm), self._head.place(layer), layer
        return self._head.asker(layer, "foregate_predict_lstm", *known, given=2, kept=self._mine)


class EncoderKernel(_Headed):
    """``head`` on what two ``blocks`` make of the window's last position: of ``embed`` [1, E, d] rows and ``positions``
    [L, d], by ``ids`` [W - 1 + L, K], of which the first W - 1 are of nobody. Given is where what
    the layer chose lies [K], which goes to ``ids``, unless that has it; a question that is given a choice ends before
    one that is not."""

    def __init__(
        self,
        head: NetworkKernel,
        blocks: Sequence[EncoderBlock],
        embed: Rows,
        positions: Floats,
        ids: NDArray[np.int64],
        window: int,
        heads: int,
    ) -> None:
        super().__init__(head, [stage.products for block in blocks for stage in block.stages])
        made = [
            _Block(
                *(stage.products.matrices[0] for stage in block.stages),
                *(pointer(stage.bias) for stage in block.stages),
                *map(pointer, block.norms),
            )
            for block in blocks
        ]
        layers, width = positions.shape
        self._encoder = _Encoder(
            embed.given[0], pointer(positions), ids.ctypes.data, self._there.ctypes.data, (_Block * 2)(*made),
            window, width, heads, ids.shape[1], embed.count, layers,
        )  # fmt: skip
        self._mine = self._encoder, tuple(blocks), embed, positions, ids, self._there
        self._ask = [self._asker(layer) for layer in range(layers)]

    def _arguments(self, choice: int | None) -> tuple[Place, ...]:
        return (choice,)

    def _asker(self, layer: int) -> Ask:
        known = ctypes.addressof(self._encoder), self._head.place(layer), layer
        return self._head.asker(layer, "foregate_predict_encoder", *known, given=1, kept=self._mine)


class GruKernel:
    """A gated recurrent unit: ``products`` [3 d, d] and ``biases`` [3 d] of the input and of the ``state`` [d], and a
    third product [d, d] of that."""

    def __init__(
        self, products: tuple[Products, Products, Products], biases: tuple[Floats, Floats], state: Floats
    ) -> None:
        matrices = [part.matrices[0] for part in products]
        self._gru = _Gru(*matrices, (c_void_p * 2)(*map(pointer, biases)), pointer(state), len(state))
        self._kept = products, biases, state
        self._at, self._step = ctypes.addressof(self._gru), function(loaded(), "foregate_step_gru", 2)

    def __call__(self, row: Floats) -> None:
        """A step of ``state`` on the first half of ``row`` [2 d], in one piece, which becomes zero; the other half
        becomes the third product. Raises MemoryError or IntegrityError."""
        answer = self._step(self._at, pointer(row))
        if answer:
            refuse(answer)
