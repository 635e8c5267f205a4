"""A mean that forgets."""

from __future__ import annotations


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
