"""Where the original lies along every dimension of the inflated tensors, and which indices cannot reach the output.

An index of an axis either carries an original index, or is free (what is there cannot matter), or is silent (what is
there must be zero). An element of a tensor is random if its row or column is free, the original's where both carry,
and zero otherwise. Shapes: D hidden, F width, H query heads, G key/value heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foregate.testing.inflate_sizes import Inflation, Sizes, kv_copies

NONE = -1
"""In ``source``: no original index."""


@dataclass(frozen=True, slots=True)
class Axis:
    """``source``: the original index carried, or NONE; ``free``: True where anything may stand. Both [inflated]."""

    before: int
    source: NDArray[np.int64]
    free: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.source)

    @property
    def carried(self) -> int:
        """How many indices carry an original one."""
        return int((self.source != NONE).sum())

    @property
    def bound(self) -> int:
        """How many indices are not free."""
        return len(self) - int(self.free.sum())


def same(length: int) -> Axis:
    """An axis that is not inflated."""
    return Axis(length, np.arange(length), np.zeros(length, np.bool_))


def padded(before: int, after: int, *, free: bool) -> Axis:
    """The original first, the rest free or silent."""
    source = np.full(after, NONE)
    source[:before] = np.arange(before)
    return Axis(before, source, (source == NONE) & free)


def axes(inflation: Inflation) -> Mapping[str, Axis]:
    """Every axis by the name that the rules call it."""
    before, after = inflation.before, inflation.after
    widths = {"expert": (before.expert, after.expert), "shared": (before.shared, after.shared)}
    widths["dense"] = (before.dense, after.dense)
    found = {**_hidden(inflation), **_attention(inflation)}
    for name, (own, grown) in widths.items():
        # silu(gate) * up is zero for a padded unit, whatever its gate is, once up is; then down is free there
        found[f"{name}.gate"] = found[f"{name}.down"] = padded(own, grown, free=True)
        found[f"{name}.up"] = padded(own, grown, free=False)
    return found


def _hidden(inflation: Inflation) -> dict[str, Axis]:
    """``residual``: what is added to it; ``norm``: norm weights; ``input``: the normed values that matrices read."""
    before, after = inflation.before.hidden, inflation.after.hidden
    stream = padded(before, after, free=False)
    norm = padded(before, after, free=True)
    for copy in range(1, inflation.copies):
        # a further copy counts in the mean square; a norm weight of zero keeps it from the matrices
        place = slice(copy * after // inflation.copies, copy * after // inflation.copies + before)
        stream.source[place] = np.arange(before)
        norm.free[place] = False
    return {"residual": stream, "norm": norm, "input": padded(before, after, free=True)}


def _attention(inflation: Inflation) -> dict[str, Axis]:
    """Heads that are added see everything and say nothing: their values are zero, or the output ignores them."""
    before, after, d = inflation.before, inflation.after, inflation.head_dim
    query, kv = head_places(before, after)
    silent_group = kv == NONE
    # a value head without an original gives zeros, so that what the output weights do with them is free
    unheard = (query == NONE) & np.repeat(silent_group, after.heads // after.kv_heads)
    return {
        "q": _by_head(query, query == NONE, before.heads, d),
        "k": _by_head(kv, silent_group, before.kv_heads, d),
        "v": _by_head(kv, np.zeros_like(silent_group), before.kv_heads, d),
        "o": _by_head(query, unheard, before.heads, d),
    }


def head_places(before: Sizes, after: Sizes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which original head each query head [H'] and each key/value head [G'] carries, or NONE.

    Every query head keeps its key/value head; one that more queries share than the new grouping allows is copied.
    """
    shared, shared_after = before.heads // before.kv_heads, after.heads // after.kv_heads
    copies = kv_copies(before, after)
    query, kv = np.full(after.heads, NONE), np.full(after.kv_heads, NONE)
    for head in range(before.heads):
        group, rank = divmod(head, shared)
        place = group * copies + rank // shared_after
        kv[place] = group
        query[place * shared_after + rank % shared_after] = head
    return query, kv


def _by_head(source: NDArray[np.int64], free: NDArray[np.bool_], heads: int, d: int) -> Axis:
    """The axis of d rows a head."""
    rows = source[:, None] * d + np.arange(d)
    rows[source == NONE] = NONE
    return Axis(heads * d, rows.reshape(-1), np.repeat(free, d))
