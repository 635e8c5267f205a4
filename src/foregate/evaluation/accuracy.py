"""How good rankings are, counted per prompt and layer, so that any grouping and any bootstrap is a sum afterwards.

Shapes: T decode tokens, L MoE layers, k experts chosen by the widest layer, E experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.prompt import Shape

Array = NDArray[np.float64]


def metric_names(shape: Shape) -> tuple[str, ...]:
    """Recall is of the k chosen among the first k, k+1 … 2k of a ranking."""
    k = max(shape.top_k)
    wider = tuple(f"recall_at_k+{extra}" for extra in range(1, k + 1))
    return ("recall_at_k", *wider, "exact_set", "top1", "at_least_half", "jaccard", "rank_alignment")


def count(ranks: NDArray[np.int16], chosen: NDArray[np.int32], shape: Shape) -> tuple[Array, Array]:
    """Sums over the tokens of a prompt of every metric, [metrics, L], and how many rankings were made, [L].

    ``ranks`` [T, L, E] (-1: no more), ``chosen`` [T, L, k] by router weight (-1: none). Every metric of a ranking is
    from 0 to 1: recall@m is of the chosen; ``rank_alignment`` is the share of ranks i whose expert is the same.
    """
    names = metric_names(shape)
    sums = np.zeros((len(names), shape.layers))
    made = np.zeros(shape.layers)
    for layer, k in enumerate(shape.top_k):
        said = ranks[:, layer, 0] >= 0
        made[layer] = said.sum()
        if said.any():
            sums[:, layer] = _of_layer(ranks[said, layer], chosen[said, layer, :k], names)
    return sums, made


def _of_layer(ranks: NDArray[np.int16], chosen: NDArray[np.int32], names: tuple[str, ...]) -> Array:
    k = chosen.shape[1]
    hit = (ranks[:, :, None] == chosen[:, None, :]).any(axis=2) & (ranks >= 0)
    found = np.cumsum(hit, axis=1)
    among = {m: found[:, min(m, found.shape[1]) - 1] for m in range(k, 2 * k + 1)}
    both, named = among[k], np.minimum((ranks >= 0).sum(axis=1), k)
    values = {
        "exact_set": both == k,
        "top1": hit[:, 0],
        "at_least_half": both * 2 >= k,
        "jaccard": both / (k + named - both),
        "rank_alignment": (ranks[:, :k] == chosen).mean(axis=1),
    }
    # A layer that chooses fewer than the widest has no more than its own 2k.
    widths = sum(name.startswith("recall") for name in names)
    recalls = [among[min(k + extra, 2 * k)].sum() / k for extra in range(widths)]
    rest = [float(values[name].sum()) for name in names if not name.startswith("recall")]
    return np.array([*map(float, recalls), *rest])
