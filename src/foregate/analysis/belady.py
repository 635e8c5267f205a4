"""Belady's rule (1966): forget the expert whose next use is farthest away. The optimum for events replayed whole."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Sequence

from foregate.analysis.replay import Event
from foregate.errors import IntegrityError
from foregate.types import ExpertKey

NEVER = 1 << 62


class Belady:
    """A policy that has seen the future: ``events``, which must then be replayed in order, each expert touched once.

    Exact: every miss costs one read and all experts of an event must be resident together, so the exchange argument
    for single requests holds event by event. Memory: one integer per use.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        self._uses: dict[ExpertKey, list[int]] = defaultdict(list)
        for number in range(len(events) - 1, -1, -1):
            for key in events[number]:
                self._uses[key].append(number)
        self._next: dict[ExpertKey, int] = {}
        self._heap: list[tuple[int, ExpertKey]] = []

    def touch(self, key: ExpertKey) -> None:
        """Raises IntegrityError if the replay has left the events that were given."""
        uses = self._uses.get(key)
        if not uses:
            raise IntegrityError(f"{key} is used more often than in the events that were given")
        uses.pop()
        after = uses[-1] if uses else NEVER
        self._next[key] = after
        heapq.heappush(self._heap, (-after, key))

    def victim(self, candidates: Collection[ExpertKey]) -> ExpertKey:
        """Raises IntegrityError if no candidate was ever touched."""
        passed = []
        chosen: ExpertKey | None = None
        while self._heap and chosen is None:
            entry = heapq.heappop(self._heap)
            if self._next.get(entry[1]) == -entry[0]:  # else outdated: the key was used or forgotten since
                passed.append(entry)
                chosen = entry[1] if entry[1] in candidates else None
        for entry in passed:
            heapq.heappush(self._heap, entry)
        if chosen is None:
            raise IntegrityError(f"none of {len(candidates)} candidates was ever touched")
        return chosen

    def forget(self, key: ExpertKey) -> None:
        self._next.pop(key, None)
