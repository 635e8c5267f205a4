"""Keys and values that grow in place: a layer of transformers' cache with room for tokens to come.

transformers copies all keys and values of a layer for every token (4 MB at 2,000 positions of 4 heads of 128).
Shapes: G key/value heads, S positions, W width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from foregate.native import kernels

BLOCK = 128
"""Positions that room is made for at a time: what a cache takes more than its tokens, at most, in each layer."""


class RoomyLayer(DynamicLayer):
    """``keys`` and ``values`` [1, G, S, W] are the first S positions of a larger tensor, which new ones are written to.

    Whoever replaces them (to crop, to reorder) may: the next update copies what it finds.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        self._rooms: list[Tensor | None] = [None, None]
        self._lengths = [0, 0]
        self._places: tuple[int, ...] | None = None
        """Of both rooms as ``place`` gives them; None: to be found out."""
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it without types
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values

    @property
    def keys(self) -> Tensor | None:
        """[1, G, S, W]."""
        return self._held(0)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._take(0, keys)

    @property
    def values(self) -> Tensor | None:
        """[1, G, S, W]."""
        return self._held(1)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._take(1, values)

    def _held(self, which: int) -> Tensor | None:
        room, length = self._rooms[which], self._lengths[which]
        return room if room is None or room.dim() < 4 or room.shape[2] == length else room.narrow(2, 0, length)

    def _take(self, which: int, states: Tensor | None) -> None:
        self._rooms[which] = states
        self._lengths[which] = 0 if states is None or states.dim() < 4 else states.shape[2]
        self._places = None

    def get_seq_length(self) -> int:
        """S."""
        return self._lengths[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions, the new ones included."""
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        for which, new in enumerate((key_states, value_states)):
            first = self._lengths[which]
            self._widen(which, new.shape[2])
            self._lengths[which] = last = first + new.shape[2]
            room = self._rooms[which]
            assert room is not None
            room[:, :, first:last] = new
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def place(self, heads: int, width: int) -> tuple[int, ...] | None:
        """Where a position more is to be written: address and strides (of a head, of a row) of the keys, then of the
        values, and S + 1; None where there are not ``heads`` (G) of ``width`` (W). ``grow``, once it is written."""
        first, last = self._lengths
        if self._places is None or self._full():
            if first != last or not all(_has(held, (1, heads, first, width)) for held in (self.keys, self.values)):
                return None
            self._places = tuple(number for which in (0, 1) for number in self._widen(which, 1))
        return (*self._places, first + 1)

    def grow(self) -> None:
        """The position that ``place`` told of counts."""
        self._lengths[0] += 1
        self._lengths[1] += 1

    def _full(self) -> bool:
        return any(r is None or n >= r.shape[2] for r, n in zip(self._rooms, self._lengths, strict=True))

    def _widen(self, which: int, more: int) -> tuple[int, int, int]:
        """Have room for ``more`` positions; where it is."""
        room, before = self._rooms[which], self._lengths[which]
        assert room is not None
        after = before + more
        if after > room.shape[2]:
            larger = room.new_empty(*room.shape[:2], (after // BLOCK + 1) * BLOCK, room.shape[3])
            larger[:, :, :before] = room[:, :, :before]
            self._rooms[which] = room = larger
            self._places = None
        return room.data_ptr(), room.stride(1), room.stride(2)


def _has(held: Tensor | None, shape: tuple[int, ...]) -> bool:
    return held is not None and held.shape == shape and held.dtype is torch.bfloat16


def make_room(past: Any) -> None:
    """Let the bf16 layers of ``past`` grow in place, where the kernels attend: they see no difference.

    Everything else stays transformers' own, in which torch would see other strides.
    """
    if type(past) is not DynamicCache or kernels.library() is None:
        return
    for index, layer in enumerate(past.layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.keys.dtype is torch.bfloat16:
            past.layers[index] = RoomyLayer(layer)
