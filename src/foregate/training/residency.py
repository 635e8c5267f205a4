"""Which experts a cache would lack, for losses that count misses. No torch.

Shapes: T tokens, L layers, k chosen, E experts of the widest layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def absent_experts(
    chosen: NDArray[np.int64], first: NDArray[np.bool_], experts: Sequence[int], share: float
) -> NDArray[np.uint8]:
    """1 where an expert is not in an LRU cache when its layer is reached, [T, L, E].

    One pool for all layers, of ``share`` of all experts, cold at the ``first`` token of each prompt; the experts of a
    layer enter together. ``chosen`` [T, L, k] has -1 where a layer chooses fewer.
    """
    tokens, layers, _ = chosen.shape
    width, capacity = max(experts), round(share * sum(experts))
    absent = np.ones((tokens, layers, width), np.uint8)
    last = np.full(layers * width, -1)
    for token in range(tokens):
        if first[token]:
            last[:] = -1
        used = np.where(chosen[token] < 0, -1, chosen[token] + width * np.arange(layers)[:, None])
        absent[token] = _absent(last, used, width, capacity)
        valid = used >= 0
        last[used[valid]] = (token * layers + np.arange(layers))[:, None].repeat(used.shape[1], 1)[valid]
    return absent


def _absent(last: NDArray[np.int64], used: NDArray[np.int64], width: int, capacity: int) -> NDArray[np.bool_]:
    """``last`` [L E] is the event of each expert's last use, -1 never; ``used`` [L, k] what this token uses.

    An expert is resident while fewer than ``capacity`` others were used since it was. What this token uses counts once
    it lies before the expert's layer, unless it was more recent than the expert already.
    """
    layers = len(used)
    order = np.argsort(-last, kind="stable")
    newer = np.empty(len(last), np.int64)
    newer[order] = np.arange(len(last))
    place = newer.reshape(layers, width)
    were = np.where(used < 0, -1, newer[used]).ravel()
    earlier = np.arange(layers)[:, None] > np.arange(layers).repeat(used.shape[1])
    pushed = np.count_nonzero((were > place[:, :, None]) & earlier[:, None], axis=2)
    absent: NDArray[np.bool_] = (place + pushed >= capacity) | (last.reshape(layers, width) < 0)
    return absent
