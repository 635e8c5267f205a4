"""How near a guessed router input is to the true one, layer by layer: cosine of q_l and s_l.

Shapes: T decode tokens, L MoE layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foregate.evaluation.asking import ask
from foregate.evaluation.judge import Bench
from foregate.evaluation.trace_signals import TraceSignals
from foregate.interfaces import Predictor, Signals
from foregate.predictors.base import BasePredictor
from foregate.types import Prediction


class _Listening(TraceSignals):
    """Compares every normed guess for the next layer with what that layer's router was really fed."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.shape, bench.routers)
        self.sums = np.zeros(bench.shape.layers)
        self.counts = np.zeros(bench.shape.layers)

    def normed(self, target: int, residual: NDArray[np.float32]) -> NDArray[np.float32]:
        guess = super().normed(target, residual)
        if target == self.layer + 1:
            assert self._prompt is not None
            true = self._prompt.hidden["router_input"][self._token, target]
            length = float(np.linalg.norm(guess) * np.linalg.norm(true))
            if length > 0:
                self.sums[target] += float(guess @ true) / length
                self.counts[target] += 1
        return guess


class PlainSignal(BasePredictor):
    """s_l = Norm_{l+1}(r_l), the plain signal, asked for as a vector."""

    name = "plain signal"
    signal = "residual"

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        if signals.layer + 1 < signals.layers:
            signals.normed(signals.layer + 1, signals.hidden("residual"))
        return ()


def cosines(bench: Bench, predictor: Predictor, tokens: int) -> list[float | None]:
    """Mean cosine of what ``predictor`` feeds to the norm of the next layer and the true router input, by layer.

    Of about ``tokens`` tokens. None for layer 0, which nothing comes before. Raises ConfigError for missing features.
    """
    heard = _Listening(bench)
    left = tokens
    for prompt in bench.prompts:
        if left > 0:
            ask(predictor, heard, prompt, bench.shape)
            left -= prompt.tokens
    return [float(s / c) if c else None for s, c in zip(heard.sums, heard.counts, strict=True)]
