"""Counters of one run, folded from events alone, under the names of the run's own JSON."""

from __future__ import annotations

from typing import Any

from foregate import events
from foregate.events import EventSorter, Fate, Move, Part, Use
from foregate.types import Phase

_FATES = {Fate.USED: ("used", 1), Fate.WASTED: ("wasted", 1), Fate.CANCELLED: ("cancelled", 1),
          Fate.REVIVED: ("cancelled", -1)}  # fmt: skip


class Tally(EventSorter):
    """``as_dict`` agrees with ``RunReport.as_dict`` wherever they share a key.

    As there: a prompt's reading ahead of whole layers is no prefetch, and its bytes count as demand.
    """

    def __init__(self) -> None:
        self._phase = Phase.PREFILL
        self._evictions = 0
        self._hits = 0
        self._misses = 0
        self._bytes = {"demand": 0, "prefetch": 0}
        self._prefetch = dict.fromkeys(("issued", "used", "late", "wasted", "cancelled"), 0)
        self._stall = {"demand_s": 0.0, "late_prefetch_s": 0.0}
        self._tokens = 0
        self._ttft_s = 0.0
        self._decode_s = 0.0

    def expert_used(self, event: events.ExpertUsed) -> None:
        hit = event.how in (Use.HIT, Use.STAGED_HIT)
        self._hits += hit
        self._misses += not hit
        self._count("late", event.how is Use.LATE)

    def read_submitted(self, event: events.ReadSubmitted) -> None:
        self._count("issued", event.speculative)

    def read_ended(self, event: events.ReadEnded) -> None:
        ahead = event.speculative and self._phase is Phase.DECODE
        self._bytes["prefetch" if ahead else "demand"] += sum(span.nbytes for span in event.spans)

    def expert_moved(self, event: events.ExpertMoved) -> None:
        self._evictions += event.move is Move.EVICTED

    def pass_began(self, event: events.PassBegan) -> None:
        self._phase = event.phase

    def speculation_ended(self, event: events.SpeculationEnded) -> None:
        self._count(*_FATES[event.fate])

    def time_spent(self, event: events.TimeSpent) -> None:
        if event.part is Part.WAIT:
            self._stall["late_prefetch_s" if event.late else "demand_s"] += (event.ended - event.began) / 1e9

    def token_made(self, event: events.TokenMade) -> None:
        self._tokens += 1
        if event.step.phase is Phase.PREFILL:
            self._ttft_s = event.step.stats.wall_s
        else:
            self._decode_s += event.step.stats.wall_s

    def as_dict(self) -> dict[str, Any]:
        """Seconds and bytes."""
        return {
            "completion_tokens": self._tokens,
            "ttft_s": self._ttft_s,
            "tpot_s": self._decode_s / (self._tokens - 1) if self._tokens > 1 else 0.0,
            "expert_cache": {"hits": self._hits, "misses": self._misses, "evictions": self._evictions},
            "read_bytes": dict(self._bytes),
            "prefetch": dict(self._prefetch),
            "stall_s": sum(self._stall.values()),
            "stall": dict(self._stall),
        }

    def _count(self, name: str, number: int) -> None:
        if self._phase is Phase.DECODE:
            self._prefetch[name] += number
