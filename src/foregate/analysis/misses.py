"""Which decode choices an LRU cache would have missed: the experts that a prediction could help with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.prompt import Prompt, Shape
from foregate.analysis.replay import Keys, Replay
from foregate.experts.policy import Lru


class MissMask:
    """A cold LRU cache of a share of all experts, kept from prompt to prompt. Replays at most ``limit`` events."""

    def __init__(self, shape: Shape, residency: float, limit: int) -> None:
        self.name = f"{residency:.0%} residency"
        self.slots = int(shape.total * residency)
        self._enough = self.slots >= max(shape.top_k)
        self._keys = Keys(shape)
        self._replay = Replay(Lru(), self.slots)
        self._left = limit

    def add(self, prompt: Prompt) -> NDArray[np.bool_]:
        """[T, L, k]: True for experts of decode tokens that were not resident. All False once the limit is reached."""
        missed: NDArray[Any] = np.zeros(prompt.experts.shape, bool)
        if not self._enough:
            return missed
        for token in np.flatnonzero(prompt.decode):
            for layer, chosen in enumerate(prompt.experts[token].tolist()):
                if self._left <= 0:
                    return missed
                self._left -= 1
                event = self._keys.event(layer, chosen)
                absent = self._replay.run(event)
                if absent:
                    missed[token, layer, : len(event)] = [key in absent for key in event]
        return missed
