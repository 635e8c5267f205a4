"""Ratios with an interval over prompts: tokens of one prompt are alike, so prompts are what is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_SMALL = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
_Z = 1.959964


class RatioSums:
    """Sums over prompts, of any shape, from which a ratio and its 95 % interval follow. Five numbers a ratio."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._sums = np.zeros((6, *shape))

    def add(self, above: Array, below: Array, where: Any = ...) -> None:
        """One prompt's numerators and denominators."""
        parts = (above, below, above * above, above * below, below * below, below > 0)
        for number, part in enumerate(parts):
            self._sums[number][where] += part

    def summed(self, axis: int) -> RatioSums:
        """The same prompts with one axis of disjoint groups of prompts added up."""
        out = RatioSums(())
        out._sums = self._sums.sum(axis=axis + 1)
        return out

    def at(self, index: Any) -> Ratio:
        """The ratio at ``index``."""
        n, d, nn, nd, dd, prompts = (float(part[index]) for part in self._sums)
        if not d:
            return Ratio(float("nan"), float("nan"), float("nan"), 0, 0)
        ratio = n / d
        if prompts < 2:
            return Ratio(ratio, float("nan"), float("nan"), int(d), int(prompts))
        spread = max(0.0, nn - 2 * ratio * nd + ratio * ratio * dd)
        half = t_quantile(int(prompts) - 1) * np.sqrt(spread * prompts / (prompts - 1)) / d
        return Ratio(ratio, max(0.0, ratio - half), min(1.0, ratio + half), int(d), int(prompts))


@dataclass(frozen=True, slots=True)
class Ratio:
    """``low`` and ``high`` bound the 95 % interval over prompts (linearised ratio, Student's t); NaN for one prompt."""

    value: float
    low: float
    high: float
    cases: int
    prompts: int


def t_quantile(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t: a table up to 4, then Cornish and Fisher's expansion (error < 0.03)."""
    if freedom in _SMALL:
        return _SMALL[freedom]
    z, n = _Z, freedom
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
