"""The WSD learning-rate schedule: warm-up, constant, linear decay. The constant phase can be lengthened at will."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Lengths in steps; `peak` is the learning rate of the constant phase."""

    peak: float
    total: int
    warmup: int
    decay: int
    final_ratio: float = 0.02

    @property
    def decay_begins(self) -> int:
        """First step of the decay."""
        return self.total - self.decay

    def rate(self, step: int) -> float:
        """Learning rate of a step (0-based)."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        left = min(1.0, (self.total - step) / max(1, self.decay))
        return self.peak * warm * (self.final_ratio + (1.0 - self.final_ratio) * left)
