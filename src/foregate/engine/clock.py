"""How long an engine's products of matrices take: those of experts, and the dense ones that the kernels compute."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import TypeVar

Made = TypeVar("Made")


class Clock:
    """``ns``: nanoseconds in all calls so far. One thread."""

    __slots__ = ("ns",)

    def __init__(self) -> None:
        self.ns = 0

    def timed(self, product: Callable[..., Made], *args: object) -> Made:
        """``product(*args)``, its time added."""
        began = perf_counter_ns()
        made = product(*args)
        self.ns += perf_counter_ns() - began
        return made
