"""How long an engine's products of matrices take: those of experts, and the dense ones that the kernels compute."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import TypeVar

from foregate.experts.compute import End

Made = TypeVar("Made")


class Clock:
    """``ns``: nanoseconds in which a product was being computed, by any thread. ``beside_ns``: in which none was, nor
    was a read waited for, but one that was needed was under way. ``now``: when the last call returned. One thread asks.
    """

    __slots__ = ("_away", "_spans", "beside_ns", "now", "ns")

    def __init__(self) -> None:
        self.ns = self.beside_ns = self.now = 0
        self._spans: list[tuple[int, int]] = []
        self._away = (0, 0)

    def away(self, since: int, until: int) -> None:
        """The engine's user had control: what others compute meanwhile takes nobody's time."""
        self._away = since, until

    def timed(self, product: Callable[..., Made], *args: object) -> Made:
        """``product(*args)``, its time added."""
        began = perf_counter_ns()
        made = product(*args)
        self.now = perf_counter_ns()
        self._add(began, self.now)
        return made

    def ended(self, since: int, end: End) -> float:
        """``end()``, added with what others have computed since ``since``: how many seconds experts took of that."""
        began, before = perf_counter_ns(), self.ns
        computed, beyond, other = end()
        self.now = perf_counter_ns()
        last, (left, back) = min(began, since + computed), self._away
        if since < back:
            self._add(since, max(since, min(last, left)))
            since = min(last, back)
        self._add(since, last)
        self._add(began, self.now - other)
        return (self.ns - before - beyond) * 1e-9

    def read_beside(self, since: int, until: int, waited_ns: int) -> None:
        """Needed reads were under way from ``since`` to ``until``, and waited for in so many of these nanoseconds."""
        computed = sum(max(0, min(last, until) - max(first, since)) for first, last in self._spans)
        self.beside_ns += max(0, until - since - waited_ns - computed)

    def forget(self) -> None:
        """When products were computed so far matters no more."""
        self._spans.clear()

    def _add(self, began: int, ended: int) -> None:
        self.ns += ended - began
        self._spans.append((began, ended))
