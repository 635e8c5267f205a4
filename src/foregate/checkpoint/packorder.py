"""In which order the experts of a layer lie in a pack. Numbers only: where counts come from is for the caller."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foregate.errors import PackError

Orders = tuple[tuple[int, ...], ...]
"""For every MoE layer its experts in file order."""


def by_expert(counts: Sequence[int]) -> Orders:
    """The plain order; ``counts`` are experts per layer."""
    return tuple(tuple(range(count)) for count in counts)


def by_coactivation(together: NDArray[np.integer]) -> tuple[int, ...]:
    """Experts that the same tokens choose become neighbours; ``together`` [E, E] counts those tokens.

    Greedy: the most frequent pairs first, each joined unless one of them has two neighbours already or they would
    close a ring. Ties go by expert id, so the same counts give the same pack.
    """
    size = len(together)
    left, right = np.triu_indices(size, 1)
    neighbours: list[list[int]] = [[] for _ in range(size)]
    chain = list(range(size))  # a name for the chain that an expert is in
    for pair in np.argsort(-together[left, right].astype(np.int64), kind="stable"):
        a, b = int(left[pair]), int(right[pair])
        if len(neighbours[a]) < 2 and len(neighbours[b]) < 2 and chain[a] != chain[b]:
            neighbours[a].append(b)
            neighbours[b].append(a)
            gone = chain[b]
            chain = [chain[a] if name == gone else name for name in chain]
    return _walk(neighbours)


def check_orders(orders: Orders, counts: Sequence[int]) -> None:
    """Raises PackError unless ``orders`` names every expert of every layer (``counts`` of them) once."""
    if len(orders) != len(counts):
        raise PackError(f"an order of {len(orders)} layers for a model of {len(counts)} MoE layers")
    for layer, (order, count) in enumerate(zip(orders, counts, strict=True)):
        if sorted(order) != list(range(count)):
            raise PackError(f"the order of MoE layer {layer} does not name each of its {count} experts once")


def _walk(neighbours: list[list[int]]) -> tuple[int, ...]:
    """From the end of the one chain that joins them all to its other end."""
    here = next((expert for expert, beside in enumerate(neighbours) if len(beside) < 2), 0)
    order, before = [here], -1
    while following := [expert for expert in neighbours[here] if expert != before]:
        before, here = here, following[0]
        order.append(here)
    return tuple(order)
