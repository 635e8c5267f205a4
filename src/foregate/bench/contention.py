"""How much slower an arm's experts compute while its own reads run: seen in the arm, not beside an endless reader."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.events import Event, Part, PassBegan, ReadEnded, TimeSpent
from foregate.types import Phase

FEWEST = 20
"""Experts of either kind; below that the ratio would be noise."""

MOSTLY = 0.5
"""Share of an expert's time with a read running from which on it counts as computed while reading."""


class ContentionWatch:
    """A listener: every expert's span of computing in decode, and every span of reading."""

    def __init__(self) -> None:
        self._decoding = False
        self.computed: list[tuple[int, int]] = []
        self.read: list[tuple[int, int]] = []

    def on_event(self, event: Event) -> None:
        if isinstance(event, PassBegan):
            self._decoding = event.phase is Phase.DECODE
        elif isinstance(event, ReadEnded):
            self.read += [(span.began, span.ended) for span in event.spans]
        elif isinstance(event, TimeSpent) and event.part is Part.EXPERT and self._decoding:
            self.computed.append((event.began, event.ended))

    def as_dict(self) -> dict[str, Any]:
        return contention(self.computed, self.read)


def contention(computed: Sequence[tuple[int, int]], read: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Mean time of an expert while a read ran over that without one; ``ratio`` None where too few are of either kind.

    Spans are (began, ended), ns. An expert that was read beside for a smaller part of its time is of neither kind.
    """
    spans = np.array(computed, dtype=np.int64).reshape(-1, 2)
    lengths = np.maximum(spans[:, 1] - spans[:, 0], 1)
    share = _overlap(spans, _union(read)) / lengths
    busy, quiet = lengths[share >= MOSTLY], lengths[share == 0]
    enough = min(busy.size, quiet.size) >= FEWEST
    return {
        "ratio": float(busy.mean() / quiet.mean()) if enough else None,
        "expert_us_while_reading": float(busy.mean()) * 1e-3 if busy.size else None,
        "expert_us_without": float(quiet.mean()) * 1e-3 if quiet.size else None,
        "experts_while_reading": int(busy.size),
        "experts_without": int(quiet.size),
    }


def _union(spans: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Disjoint, ascending: [N, 2]."""
    merged: list[list[int]] = []
    for began, ended in sorted(spans):
        if merged and began <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], ended)
        else:
            merged.append([began, ended])
    assert all(a[1] < b[0] for a, b in pairwise(merged))
    return np.array(merged, dtype=np.int64).reshape(-1, 2)


def _overlap(spans: NDArray[np.int64], union: NDArray[np.int64]) -> NDArray[np.float64]:
    """Nanoseconds of each of ``spans`` that lie in ``union``."""
    if not len(union):
        return np.zeros(len(spans))
    # time covered up to a moment, at both ends of every span
    edges = union.ravel()
    covered = np.concatenate([[0], np.cumsum(union[:, 1] - union[:, 0])])
    levels = np.repeat(covered, 2)[1:-1]
    low, high = (np.interp(spans[:, side], edges, levels) for side in (0, 1))
    return np.asarray(high - low, dtype=np.float64)
