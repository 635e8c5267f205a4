"""Event-atomic replay: the experts of one event are needed together, so none of them may push another out.

An event is what one layer needs at once: the k experts of a decode token, or the union over a prefill pass. A hit is an
expert that is resident when its event begins. The policies are those of the engine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from foregate.analysis.prompt import Shape
from foregate.interfaces import EvictionPolicy
from foregate.types import ExpertKey

Event = tuple[ExpertKey, ...]


class Keys:
    """One object a key: a replay compares and hashes the same few thousand keys millions of times."""

    def __init__(self, shape: Shape) -> None:
        self._keys = [[ExpertKey(n, e) for e in range(size)] for n, size in enumerate(shape.experts_per_layer)]

    def event(self, layer: int, experts: Iterable[int]) -> Event:
        """The keys of ``experts``; negative ids are padding."""
        keys = self._keys[layer]
        return tuple(keys[expert] for expert in experts if expert >= 0)


class _Evictable(Collection[ExpertKey]):
    """Residents that the current event does not need."""

    def __init__(self, resident: dict[ExpertKey, None]) -> None:
        self._resident = resident
        self.needed: Collection[ExpertKey] = ()

    def __contains__(self, key: object) -> bool:
        return key in self._resident and key not in self.needed

    def __iter__(self) -> Iterator[ExpertKey]:
        return (key for key in self._resident if key not in self.needed)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Replay:
    """A cache of ``slots`` experts, cold at first. Counts ``hits`` and ``misses``."""

    def __init__(self, policy: EvictionPolicy, slots: int) -> None:
        self.policy, self.slots = policy, slots
        self.hits = self.misses = 0
        self._resident: dict[ExpertKey, None] = {}
        self._evictable = _Evictable(self._resident)

    def run(self, event: Event) -> Collection[ExpertKey]:
        """Serve one event of at most ``slots`` experts: hits first, as the engine does; returns what was absent."""
        resident, touch = self._resident, self.policy.touch
        absent = []
        for key in event:
            if key in resident:
                touch(key)
            else:
                absent.append(key)
        self.hits += len(event) - len(absent)
        self.misses += len(absent)
        if absent:
            self._evictable.needed = event
            for key in absent:
                if len(resident) >= self.slots:
                    self._evict()
                resident[key] = None
                touch(key)
        return absent

    def _evict(self) -> None:
        victim = self.policy.victim(self._evictable)
        del self._resident[victim]
        self.policy.forget(victim)


def split_events(events: Sequence[Event], slots: int) -> list[Event]:
    """``events`` with those that need more than ``slots`` experts cut into pieces that fit, in the order given."""
    if all(len(event) <= slots for event in events):
        return list(events)
    return [event[n : n + slots] for event in events for n in range(0, len(event), slots)]
