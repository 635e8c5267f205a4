"""P(e_{l+h} | e_0 … e_l): what follows the most frequent prefixes of a path, by counting; no model of dependence.

Shapes: n distinct paths of L first experts, each with the tokens that took it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.sketch import hash_rows

PREFIXES = 10
"""Most frequent prefixes of every length."""
FOLLOWERS = 4
"""Most frequent experts of a later layer."""
TOKENS = 5
"""Prefixes of fewer tokens are left out: nearly all of their probabilities are 0 or 1."""
COLUMNS = ("layer", "rank", "prefix", "tokens", "later", "hop", "place", "expert", "probability", "followers")
Array = NDArray[Any]


def prefix_rows(paths: Array, counts: Array) -> Iterator[dict[str, Any]]:
    """One row a likely follower: ``probability`` of ``expert`` in layer ``later`` after the prefix 0 … ``layer``.

    ``followers`` is the number of different experts seen there. ``paths`` [n, L], ``counts`` [n].
    """
    for layer in range(paths.shape[1] - 1):
        _, first, where = np.unique(hash_rows(paths[:, : layer + 1]), return_index=True, return_inverse=True)
        tokens = np.bincount(where, weights=counts)
        order = np.lexsort((first, -tokens))[:PREFIXES]
        for rank, prefix in enumerate(order[tokens[order] >= TOKENS], 1):
            mine = where == prefix
            spelled = "-".join(str(expert) for expert in paths[first[prefix], : layer + 1])
            common = {"layer": layer, "rank": rank, "prefix": spelled, "tokens": int(tokens[prefix])}
            for row in _followers(paths[mine], counts[mine], layer):
                yield common | row


def _followers(paths: Array, counts: Array, layer: int) -> Iterator[dict[str, Any]]:
    for later in range(layer + 1, paths.shape[1]):
        seen = np.bincount(paths[:, later], weights=counts)
        for place, expert in enumerate(np.argsort(-seen, kind="stable")[:FOLLOWERS], 1):
            if seen[expert]:
                share = float(seen[expert] / counts.sum())
                row = {"later": later, "hop": later - layer, "place": place, "expert": int(expert)}
                yield row | {"probability": share, "followers": int((seen > 0).sum())}
