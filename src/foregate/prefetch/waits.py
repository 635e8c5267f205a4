"""What steps waited for their reads, and for what they needed. No torch, no I/O."""

from __future__ import annotations

import math

from foregate.prefetch.average import Average


class Waits:
    """What steps of one kind needed and waited for; the last ones count most, each with ``weight``."""

    def __init__(self, weight: float) -> None:
        self.steps = 0
        self._weight = weight
        self._needed, self._stall_s = Average(weight), Average(weight)
        self._squares, self._products, self._stall_squares = Average(weight), Average(weight), Average(weight)

    def add(self, needed: int, stall_s: float) -> None:
        self.steps += 1
        self._needed.add(needed)
        self._stall_s.add(stall_s)
        self._squares.add(needed * needed)
        self._products.add(needed * stall_s)
        self._stall_squares.add(stall_s * stall_s)

    def each(self, miss_s: float) -> float:
        """Seconds that one expert more adds: its share of the wait, or ``miss_s`` where none was needed."""
        needed = self._needed.get()
        return self._stall_s.get() / needed if needed else miss_s

    def wait(self, needed: float, each_s: float) -> float:
        """Mean wait of a step that needs ``needed``."""
        return self._stall_s.get() + each_s * (needed - self._needed.get())

    def error(self, each_s: float) -> float:
        """Standard error of ``wait``; of a single step, its size."""
        if self.steps < 2:
            return self._stall_s.get()
        mean = self._stall_s.get() - each_s * self._needed.get()
        squares = self._stall_squares.get() - 2 * each_s * self._products.get() + each_s**2 * self._squares.get()
        return math.sqrt(max(0.0, squares - mean * mean) / (min(self.steps, 2 / self._weight) - 1))
