"""How long an engine's products of matrices take: those of experts, and the dense ones that the kernels compute."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import TypeVar

Made = TypeVar("Made")


class Clock:
    """``ns``: nanoseconds in which a product was being computed, by any thread. ``now``: when the last call of this
    clock returned. One thread asks."""

    __slots__ = ("now", "ns")

    def __init__(self) -> None:
        self.ns = 0
        self.now = 0

    def timed(self, product: Callable[..., Made], *args: object) -> Made:
        """``product(*args)``, its time added."""
        began = perf_counter_ns()
        made = product(*args)
        self.now = perf_counter_ns()
        self.ns += self.now - began
        return made

    def ended(self, since: int, end: Callable[[], int]) -> None:
        """``end()``, of what others have computed from ``since`` on but for the nanoseconds that it returns."""
        idle = end()
        self.now = perf_counter_ns()
        self.ns += self.now - since - idle
