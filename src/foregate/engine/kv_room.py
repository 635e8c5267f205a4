"""Keys and values that grow in place: a layer of transformers' cache with room for tokens to come.

transformers copies all keys and values of a layer for every token (4 MB at 2,000 positions of 4 heads of 128).
Shapes: G key/value heads, S positions, W width of a head.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from foregate.native import kernels

T = TypeVar("T")

BLOCK = 128
"""Positions that room is made for at a time: what a cache takes more than its tokens, at most, in each layer."""


class RoomyLayer(DynamicLayer):
    """``keys`` and ``values`` [1, G, S, W] are the first S positions of a larger tensor, which new ones are written to.

    Whoever replaces them (to crop, to reorder) may: the next update copies what it finds.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        self._rooms: tuple[Tensor | None, Tensor | None] = (None, None)
        self._lengths = (0, 0)
        self._places: tuple[int, ...] = ()
        """Of both rooms as ``place`` gives them, once it has."""
        self._room = 0
        """Positions for which they have room then."""
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it without types
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values

    @property
    def keys(self) -> Tensor | None:
        """[1, G, S, W]."""
        return _first(self._rooms[0], self._lengths[0])

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._take(0, keys)

    @property
    def values(self) -> Tensor | None:
        """[1, G, S, W]."""
        return _first(self._rooms[1], self._lengths[1])

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._take(1, values)

    def _take(self, which: int, states: Tensor | None) -> None:
        length = 0 if states is None or states.dim() < 4 else states.shape[2]
        self._rooms, self._lengths = _with(self._rooms, which, states), _with(self._lengths, which, length)
        self._places, self._room = (), 0

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which has rooms of its own."""
        return {**self.__dict__, "_places": (), "_room": 0}

    def get_seq_length(self) -> int:
        """S."""
        return self._lengths[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions, the new ones included."""
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        given = (key_states, value_states)
        lasts = tuple(length + new.shape[2] for length, new in zip(self._lengths, given, strict=True))
        self._widen(*lasts)
        for room, last, new in zip(self._rooms, lasts, given, strict=True):
            assert room is not None
            room[:, :, last - new.shape[2] : last] = new
        self._lengths = (lasts[0], lasts[1])
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def place(self, heads: int, width: int) -> tuple[int, ...] | None:
        """Where a position more is to be written: address and strides (of a head, of a row) of the keys, then of the
        values, and S + 1; None where there are not ``heads`` (G) of ``width`` (W). ``grow``, once it is written."""
        first, last = self._lengths
        if first != last:
            return None
        if first >= self._room:
            keys, values = self.keys, self.values
            if not _has(keys, (1, heads, first, width)) or not _has(values, (1, heads, first, width)):
                return None
            self._widen(first + 1, first + 1)
            self._places = tuple(number for room in self._rooms for number in _place(room))
            self._room = min(room.shape[2] for room in self._rooms if room is not None)
        return (*self._places, first + 1)

    def grow(self) -> None:
        """The position that ``place`` told of counts."""
        first, last = self._lengths
        self._lengths = (first + 1, last + 1)

    def _widen(self, *lengths: int) -> None:
        """Have room for so many positions."""
        keys, values = map(_wide, self._rooms, self._lengths, lengths)
        self._rooms, self._places, self._room = (keys, values), (), 0


def _with(pair: tuple[T, T], which: int, value: T) -> tuple[T, T]:
    return (pair[0], value) if which else (value, pair[1])


def _first(room: Tensor | None, length: int) -> Tensor | None:
    return room if room is None or room.dim() < 4 or room.shape[2] == length else room.narrow(2, 0, length)


def _wide(room: Tensor | None, held: int, length: int) -> Tensor:
    """``room`` with its first ``held`` positions, or a larger one with the same."""
    assert room is not None
    if length <= room.shape[2]:
        return room
    larger = room.new_empty(*room.shape[:2], (length // BLOCK + 1) * BLOCK, room.shape[3])
    larger[:, :, :held] = room[:, :, :held]
    return larger


def _place(room: Tensor | None) -> tuple[int, int, int]:
    assert room is not None
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
