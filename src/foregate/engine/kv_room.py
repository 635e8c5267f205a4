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
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it without types
        assert layer.keys is not None
        assert layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self._rooms = [self.keys, self.values]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions, the new ones included."""
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        self.keys = self._add(0, self.keys, key_states)
        self.values = self._add(1, self.values, value_states)
        return self.keys, self.values

    def extended(self) -> tuple[Tensor, Tensor]:
        """Keys and values with one position more, whose content is the caller's to write before anyone reads it."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self._longer(0, self.keys, 1), self._longer(1, self.values, 1)
        return self.keys, self.values

    def _add(self, which: int, held: Tensor, new: Tensor) -> Tensor:
        longer = self._longer(which, held, new.shape[2])
        longer[:, :, held.shape[2] :] = new
        return longer

    def _longer(self, which: int, held: Tensor, more: int) -> Tensor:
        before, room = held.shape[2], self._rooms[which]
        after = before + more
        if after > room.shape[2] or held.data_ptr() != room.data_ptr():
            room = held.new_empty(*held.shape[:2], (after // BLOCK + 1) * BLOCK, held.shape[3])
            room[:, :, :before] = held
            self._rooms[which] = room
        return room.narrow(2, 0, after)


def make_room(past: Any) -> None:
    """Let the bf16 layers of ``past`` grow in place, where the kernels attend: they see no difference.

    Everything else stays transformers' own, in which torch would see other strides.
    """
    if type(past) is not DynamicCache or kernels.library() is None:
        return
    for index, layer in enumerate(past.layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.keys.dtype is torch.bfloat16:
            past.layers[index] = RoomyLayer(layer)
