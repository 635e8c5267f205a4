"""How a router makes weights from scores: recognised by watching it, because every family does it its own way.

Shapes: T tokens, E experts, k chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from foregate.errors import ConfigError

Floats = NDArray[np.float32]
Rule = Callable[[Floats, NDArray[np.int64]], Floats]

TOLERANCE = 0.02
"""Median relative error of a weight. bf16 scores of one ulp apart already differ by some per cent at the worst."""


def _softmax(scores: Floats) -> Floats:
    raised = np.exp(scores - scores.max())
    shares: Floats = raised / raised.sum()
    return shares


def _sigmoid(scores: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-scores)), np.float32)


def _share(values: Floats) -> Floats:
    return np.asarray(values / max(float(values.sum()), 1e-20), np.float32)


RULES: dict[str, Rule] = {
    "softmax over the chosen": lambda scores, chosen: _softmax(scores[chosen]),
    "softmax": lambda scores, chosen: _softmax(scores)[chosen],
    "sigmoid, normalised": lambda scores, chosen: _share(_sigmoid(scores)[chosen]),
    "sigmoid": lambda scores, chosen: _sigmoid(scores)[chosen],
}
"""Each up to a constant factor."""


class Weigher:
    """``see`` what the router gave, ``settle``, then ``weigh`` other experts or scores as it would."""

    def __init__(self, family: str) -> None:
        self.rule = ""
        self._family = family
        self._factor = 1.0
        self._seen: list[tuple[Floats, NDArray[np.int64], Floats]] = []

    def see(self, scores: Floats, chosen: NDArray[np.int64], weights: Floats) -> None:
        """For ``scores`` [E] the router chose ``chosen`` [k] with ``weights`` [k]."""
        self._seen.append((scores, chosen, weights))

    def settle(self) -> None:
        """Choose the rule that explains what was seen. Raises ConfigError where none does."""
        judged = {name: self._judge(rule) for name, rule in RULES.items()}
        self.rule = min(judged, key=lambda name: judged[name][0])
        error, self._factor = judged[self.rule]
        if not error <= TOLERANCE:
            raise ConfigError(
                f"{self._family}: how its routers weigh experts was not recognised (closest: {self.rule}, "
                f"{error:.0%} off); lossy execute-predicted cannot weigh predicted experts"
            )
        self._seen.clear()

    def weigh(self, scores: Floats, chosen: NDArray[np.int64]) -> Floats:
        """Weights [k] of ``chosen`` [k] for ``scores`` [E]."""
        return np.asarray(self._factor * RULES[self.rule](scores, chosen), np.float32)

    def _judge(self, rule: Rule) -> tuple[float, float]:
        """Median relative error of ``rule``, and the factor it needs."""
        given = np.concatenate([weights for _, _, weights in self._seen])
        made = np.concatenate([rule(scores, chosen) for scores, chosen, _ in self._seen])
        factor = float(np.median(given / np.maximum(made, 1e-20)))
        return float(np.median(np.abs(factor * made - given) / np.maximum(given, 1e-20))), factor
