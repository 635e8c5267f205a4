"""Is advice better than what a policy makes of the routing by itself? Judged by what was really needed then. No torch.

Shapes: E experts, k chosen.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

RECENT = 1 / 512
"""Weight of the newest judgement, once there are more."""
SURE = 2.0
"""Standard errors by which advice must have been worse to be dropped. It is taken again once it is better at all."""
ENOUGH = 16
"""Judgements before which nothing is said."""
FARTHEST = 30.0
"""Log-odds beyond are judged as this: one absurd value must not outweigh all else."""


class Trust:
    """By how much is the loss of advice smaller, for one layer of a token at a time? Advice is trained for that loss:
    the cross-entropy of exp(-(tokens to the next use - 1) / ``patience``), of which ``following`` tokens are seen."""

    def __init__(self, patience: float, following: int) -> None:
        self.given = True
        """Whether advice is to be taken."""
        self.judged = 0
        self._soon = [math.exp(-ago / patience) for ago in range(following)]
        self._trials: dict[int, _Trial] = {}
        self._seen = 0
        self._mean = self._square = 0.0

    def wants(self, layer: int, layers: int) -> bool:
        """Whether a trial of ``layer``, of so many, is to begin now: one in about a token, of another layer each
        time."""
        return self._seen % (layers + 1) == 0 and layer not in self._trials

    def begin(self, layer: int, own: Floats, advised: Floats) -> None:
        """Log-odds [E] of either kind are to be judged by what ``layer`` chooses from now on."""
        self._trials[layer] = _Trial(*(np.clip(odds, -FARTHEST, FARTHEST) for odds in (own, advised)))

    def saw(self, layer: int, experts: NDArray[np.int64]) -> None:
        """``layer`` chose ``experts`` [T, k] (-1: none). A prompt ends a trial without a judgement."""
        self._seen += 1
        trial = self._trials.get(layer)
        if trial is None:
            return
        if len(experts) == 1:
            trial.see(experts[0], self._soon[trial.tokens])
            if trial.tokens < len(self._soon):
                return
            self._add(trial.gain())
        del self._trials[layer]

    def _add(self, gain: float) -> None:
        self.judged += 1
        weight = max(RECENT, 1 / self.judged)
        self._mean += weight * (gain - self._mean)
        self._square += weight * (gain * gain - self._square)
        if self.judged >= ENOUGH:
            self.given = self._mean > (-SURE * self.error if self.given else 0.0)

    @property
    def error(self) -> float:
        """Of the mean gain."""
        return math.sqrt(max(0.0, self._square - self._mean**2) / (min(self.judged, 2 / RECENT) - 1))


class _Trial:
    def __init__(self, own: Floats, advised: Floats) -> None:
        self.tokens = 0
        self._own, self._advised = own, advised
        self._needed = np.zeros(len(own))

    def see(self, chosen: NDArray[np.int64], soon: float) -> None:
        self.tokens += 1
        real = chosen[(chosen >= 0) & (chosen < len(self._needed))]
        self._needed[real] = np.maximum(self._needed[real], soon)

    def gain(self) -> float:
        """Loss of the policy's own less that of advice, summed over experts."""
        losses = [np.logaddexp(0, odds) - self._needed * odds for odds in (self._own, self._advised)]
        return float((losses[0] - losses[1]).sum())
