"""A mean that forgets."""

from __future__ import annotations

import math


class Average:
    """The plain mean of the first 1 / ``weight`` values, exponentially weighted after that; None until the first."""

    def __init__(self, weight: float = 0.05) -> None:
        self.value: float | None = None
        self._weight = weight
        self._count = 0

    def add(self, value: float) -> None:
        count = self._count = self._count + 1
        before = self.value
        self.value = value if before is None else before + max(self._weight, 1 / count) * (value - before)

    def get(self, default: float = 0.0) -> float:
        """The mean, or ``default`` before the first value."""
        return default if self.value is None else self.value


class Spread(Average):
    """A mean that also knows how far single values lie from it."""

    def __init__(self, weight: float = 0.05) -> None:
        super().__init__(weight)
        self._squares = Average(weight)

    def add(self, value: float) -> None:
        super().add(value)
        self._squares.add(value * value)

    @property
    def error(self) -> float:
        """Standard error of the mean; of a single value, its size."""
        if self._count < 2:
            return abs(self.get())
        count = min(self._count, 2 / self._weight)
        return math.sqrt(max(0.0, self._squares.get() - self.get() ** 2) / (count - 1))
