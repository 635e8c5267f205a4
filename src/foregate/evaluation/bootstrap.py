"""Intervals by resampling prompts: tokens of one prompt are alike, so prompts are what is drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Bootstrap:
    """``weights`` [rounds, P]: how often each prompt is in each resample. The same for every method: paired."""

    def __init__(self, prompts: int, rounds: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        drawn = random.integers(0, prompts, size=(rounds, prompts))
        self.weights = np.zeros((rounds, prompts))
        np.add.at(self.weights, (np.arange(rounds)[:, None], drawn), 1.0)

    def ratio(self, above: Array, below: Array) -> tuple[float, float, float]:
        """Sum of ``above`` over sum of ``below`` (both [P]) with its 95 % interval; NaN where the latter is not above
        0: nothing was counted, or an oracle loses, of whose gain there is no share."""
        if below.sum() <= 0:
            return float("nan"), float("nan"), float("nan")
        over, under = self.weights @ above, self.weights @ below
        ratios = over[under > 0] / under[under > 0]
        low, high = np.percentile(ratios, [2.5, 97.5]) if len(below) > 1 and len(ratios) else (np.nan, np.nan)
        return float(above.sum() / below.sum()), float(low), float(high)

    def spread(self, above: Array, below: Array) -> float:
        """Standard error of the ratio over resamples."""
        under = self.weights @ below
        return float(np.std((self.weights @ above)[under > 0] / under[under > 0])) if below.sum() > 0 else float("nan")
