"""Which resident expert to forget: LRU, LFU and aged LFU. Policies know keys and accesses, not slots, bytes or time.

One access = one ``touch``. All three are deterministic, and break ties by evicting the key touched longest ago.
``echo`` has a file of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator

from foregate.errors import IntegrityError
from foregate.registry import Registry
from foregate.types import ExpertKey

POLICIES = Registry(
    "cache policy",
    {
        "lru": "foregate.experts.policy:Lru",
        "lfu": "foregate.experts.policy:Lfu",
        "lfru": "foregate.experts.policy:Lfru",
        "echo": "foregate.experts.echo:Echo",
    },
)


def _oldest(order: Iterable[ExpertKey], candidates: Collection[ExpertKey]) -> ExpertKey | None:
    """First key of ``order`` that is a candidate; the keys skipped are the pinned ones, so the walk is short."""
    for key in order:  # a plain loop: half the time of a generator, and replays evict millions of times
        if key in candidates:
            return key
    return None


class Lru:
    """Evicts the key whose last access is longest ago. O(1) a touch; a victim costs one step per pinned key skipped."""

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def touch(self, key: ExpertKey) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def victim(self, candidates: Collection[ExpertKey]) -> ExpertKey:
        """Raises IntegrityError if no candidate was ever touched."""
        return _found(_oldest(self._order, candidates), candidates)

    def forget(self, key: ExpertKey) -> None:
        self._order.pop(key, None)


class _Frequencies:
    """Accesses and last access of each key in the cache, with the keys of one frequency in order of last access."""

    def __init__(self) -> None:
        self.clock = 0
        self._count: dict[ExpertKey, int] = {}
        self._buckets: dict[int, OrderedDict[ExpertKey, int]] = {}

    def touch(self, key: ExpertKey) -> None:
        count = self.remove(key) + 1
        self.clock += 1
        self._count[key] = count
        self._buckets.setdefault(count, OrderedDict())[key] = self.clock

    def remove(self, key: ExpertKey) -> int:
        """Drop ``key``; its number of accesses so far (0 if unknown)."""
        count = self._count.pop(key, 0)
        if count:
            bucket = self._buckets[count]
            del bucket[key]
            if not bucket:
                del self._buckets[count]
        return count

    def oldest(self, candidates: Collection[ExpertKey]) -> Iterator[tuple[int, int, ExpertKey]]:
        """For each frequency, in increasing order: (frequency, last access, key) of its oldest candidate."""
        for count in sorted(self._buckets):
            bucket = self._buckets[count]
            key = _oldest(bucket, candidates)
            if key is not None:
                yield count, bucket[key], key


class Lfu:
    """Evicts the key with the fewest accesses since it entered the cache (in-cache LFU: eviction resets the count).

    The variant of arXiv:2511.05814 counts over the whole run; in-cache counts let a changed workload recover.
    """

    def __init__(self) -> None:
        self._keys = _Frequencies()

    def touch(self, key: ExpertKey) -> None:
        self._keys.touch(key)

    def victim(self, candidates: Collection[ExpertKey]) -> ExpertKey:
        """Raises IntegrityError if no candidate was ever touched."""
        return _found(next((key for _, _, key in self._keys.oldest(candidates)), None), candidates)

    def forget(self, key: ExpertKey) -> None:
        self._keys.remove(key)


class Lfru:
    """Aged LFU: evicts the lowest f / (age + 1); f counts accesses in the cache, age the accesses since the last one.

    Within one frequency the oldest key scores lowest, so a victim costs one comparison per distinct frequency, not
    per key. Eviction resets f.
    """

    def __init__(self) -> None:
        self._keys = _Frequencies()

    def touch(self, key: ExpertKey) -> None:
        self._keys.touch(key)

    def victim(self, candidates: Collection[ExpertKey]) -> ExpertKey:
        """Raises IntegrityError if no candidate was ever touched."""
        now = self._keys.clock
        scored = ((f / (now - last + 1), last, key) for f, last, key in self._keys.oldest(candidates))
        lowest = min(scored, default=None)
        return _found(lowest and lowest[2], candidates)

    def forget(self, key: ExpertKey) -> None:
        self._keys.remove(key)


def _found(key: ExpertKey | None, candidates: Collection[ExpertKey]) -> ExpertKey:
    if key is None:
        raise IntegrityError(f"none of {len(candidates)} candidates was ever touched")
    return key
