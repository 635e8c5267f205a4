"""Cosines and sines of positions, computed for many at a time: transformers takes as long for one.

Shapes: P positions, R numbers of a position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foregate.native.attention_block import AttentionBlock
from foregate.native.decoder_layer import Turns, turned

BLOCK = 64
"""Positions at a time."""

FIXED = {"default", "linear", "llama3", "yarn"}
"""Kinds of rotary embedding whose values depend on the position alone, not on how long the text is."""

TRIALS = (0, 63 * BLOCK)
"""Where blocks begin whose positions one by one must give the bits of all at a time."""


class Positions:
    """What ``rotary`` gives for one position after the other, for ``attention`` and hidden states like ``x``."""

    def __init__(self, rotary: Any, attention: AttentionBlock, x: Tensor) -> None:
        self._rotary, self._attention, self._x = rotary, attention, x
        self._turns: Turns | None = None
        self.forget()
        self._size = BLOCK if getattr(rotary, "rope_type", None) in FIXED and self._agrees() else 1

    def forget(self) -> None:
        """What comes next is computed anew."""
        self._first, self._held = -BLOCK, (self._x, self._x)

    def at(self, position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1, 1, R] of ``position``."""
        cos, sin = self._block(position)
        here = slice(position - self._first, position - self._first + 1)
        return cos[:, here], sin[:, here]

    def turns(self, position: int) -> Turns | None:
        """Where they lie until the next call; None where the attention does not take them."""
        self._block(position)
        if self._turns is None:
            return None
        cos, sin, numbers = self._turns
        passed = (position - self._first) * numbers * self._held[0].element_size()
        return cos + passed, sin + passed, numbers

    def _block(self, position: int) -> tuple[Tensor, Tensor]:
        if not self._first <= position < self._first + self._held[0].shape[1]:
            self._first = position - position % self._size
            cos, sin = self._held = self._many(self._first, self._size)
            fits = self._attention.takes(self._x, cos[:, :1], sin[:, :1])
            self._turns = turned(cos, sin) if fits and cos.is_contiguous() and sin.is_contiguous() else None
        return self._held

    def _many(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary.forward(self._x, position_ids=torch.arange(first, first + count)[None])
        return cos, sin

    def _agrees(self) -> bool:
        """Whether a block holds the bits of its positions."""
        for first in TRIALS:
            singles = zip(*(self._many(first + here, 1) for here in range(BLOCK)), strict=True)
            ones = [torch.cat(single, dim=1) for single in singles]
            if not all(map(torch.equal, self._many(first, BLOCK), ones)):
                return False
        return True
