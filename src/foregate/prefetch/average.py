"""An exponentially weighted mean."""

from __future__ import annotations


class Average:
    """None until the first value; then the last values count most, each with ``weight``."""

    def __init__(self, weight: float = 0.05) -> None:
        self.value: float | None = None
        self._weight = weight

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self.value + self._weight * (value - self.value)

    def get(self, default: float = 0.0) -> float:
        """The mean, or ``default`` before the first value."""
        return default if self.value is None else self.value
