"""How often what was read ahead has been used, by layer, distance and rank. No torch, no I/O."""

from __future__ import annotations

from typing import NamedTuple

from foregate.prefetch.average import Average

_PRIOR = 4.0
"""Reads that the precision of all counts for, where a layer, or a distance and rank, has few of its own."""
_EXPECTED = 0.7
"""Precision before any read was judged, worth ``_PRIOR`` reads; trained predictors have 0.65 to 0.9 on the absent."""
_BEST, _FALL, _BEYOND = 0.95, 0.45, 0.25
"""The same by rank: of the first of k, how much less of the k-th, nearly, and of those beyond. Of ``fusion`` and
``next-gate`` 0.96, 0.87, 0.77, 0.54 were measured for four, and 0.2 to 0.1 beyond."""


class Guess(NamedTuple):
    """Why a read was issued: for ``layer``, from ``distance`` layers before, ``rank``-th of the predicted (from 0)."""

    layer: int
    distance: int
    rank: int


class _Share:
    """How often something was so, with a prior that fades as cases come in."""

    def __init__(self) -> None:
        self.recent = Average(0.03)
        self.cases = 0

    def add(self, so: bool) -> None:
        self.cases += 1
        self.recent.add(1.0 if so else 0.0)

    def blended(self, prior: float) -> float:
        """The recent share, drawn towards ``prior`` while there are few cases."""
        return ((self.recent.value or 0.0) * self.cases + prior * _PRIOR) / (self.cases + _PRIOR)


class Precision:
    """Of reads ahead in a model of ``layers``; ``top_k``: experts that a router chooses; without it, all ranks are
    expected to be alike."""

    def __init__(self, layers: int, top_k: int | None = None) -> None:
        self._top_k = top_k
        self._all = _Share()
        self._by_guess: dict[tuple[int, int], _Share] = {}
        self._by_layer = [_Share() for _ in range(layers)]

    def add(self, guess: Guess, used: bool) -> None:
        """The read for ``guess`` was used or not."""
        self._all.add(used)
        self._by_guess.setdefault((guess.distance, guess.rank), _Share()).add(used)
        self._by_layer[guess.layer].add(used)

    @property
    def cases(self) -> int:
        """Reads judged."""
        return self._all.cases

    @property
    def overall(self) -> float:
        """Of all reads."""
        return self._all.blended(_EXPECTED)

    def recent(self, layer: int) -> float | None:
        """Of the reads for ``layer``, as counted; None before the first."""
        return self._by_layer[layer].recent.value

    def of(self, guess: Guess, overall: float) -> float:
        """Probability that what ``guess`` reads is used, where ``overall`` of all reads are."""
        shared, expected = self._by_guess.get((guess.distance, guess.rank)), min(1.0, overall * self._shape(guess.rank))
        general = shared.blended(expected) if shared else expected
        layer = self._by_layer[guess.layer].blended(overall)
        return min(1.0, general * layer / overall)

    def _shape(self, rank: int) -> float:
        """How much likelier than all reads one of ``rank`` is, before any was judged."""
        if self._top_k is None:
            return 1.0
        return (_BEST - _FALL * rank / self._top_k if rank < self._top_k else _BEYOND) / _EXPECTED
