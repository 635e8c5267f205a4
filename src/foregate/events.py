"""What an engine does while it does it, as flat records, and the hub that hands them to listeners. No torch.

Times are ``time.perf_counter_ns``. Every event comes from the thread that generates, in order of emission; a span is
emitted at its end, and a read at the moment at which its owner learns of its end. Without listeners an emission costs
one attribute check. Whatever a listener does, the tokens are the same.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple, Protocol, get_args

from foregate.types import ExpertKey, GenerationStep, Moment, Phase

log = logging.getLogger("foregate")


class Use(str, Enum):
    """In which state an expert was when the router asked for it."""

    HIT = "hit"
    STAGED_HIT = "staged-hit"
    """Read ahead in time."""
    LATE = "late"
    """Read ahead, but still being read: waited for."""
    MISS = "miss"


class Move(str, Enum):
    """Transitions of an expert in the cache."""

    LOADING = "loading"
    """A slot was taken for a demand read."""
    STAGED = "staged"
    """A slot was taken for a speculative read."""
    RESIDENT = "resident"
    ADOPTED = "adopted"
    """Staged and complete, used: resident."""
    PROMOTED = "promoted"
    """Staged and still being read, needed: loading."""
    EVICTED = "evicted"
    DROPPED = "dropped"
    """Staged, given up."""
    ABORTED = "aborted"
    """The demand read failed."""


class Fate(str, Enum):
    """What became of a speculative read: issued + revived = used + wasted + cancelled, once none is pending."""

    USED = "used"
    WASTED = "wasted"
    CANCELLED = "cancelled"
    REVIVED = "revived"
    """Cancelled before, and needed while it was still being read; USED follows."""


class Part(str, Enum):
    """What a span of the generating thread was spent on. EXPERTS contains EXPERT, WAIT and, after routing, PREDICT."""

    ATTENTION = "attention"
    """Attention (or what stands in for it), the norm after it and, where all of that is one call, the router."""
    ROUTING = "routing"
    EXPERTS = "experts"
    EXPERT = "expert"
    WAIT = "wait"
    PREDICT = "predict"


class ReadSpan(NamedTuple):
    """One read call of reader thread ``reader``. ``nbytes`` is 0 where it failed."""

    reader: int
    began: int
    ended: int
    nbytes: int


class ExpertUsed(NamedTuple):
    at: int
    key: ExpertKey
    how: Use


class ReadSubmitted(NamedTuple):
    at: int
    key: ExpertKey
    speculative: bool


class ReadEnded(NamedTuple):
    """One for each submission, but for a read that hangs. ``spans`` is what was read; ``ok``: it arrived."""

    at: int
    key: ExpertKey
    speculative: bool
    ok: bool
    spans: tuple[ReadSpan, ...]


class ExpertMoved(NamedTuple):
    at: int
    key: ExpertKey
    move: Move


class SpeculationEnded(NamedTuple):
    at: int
    key: ExpertKey
    fate: Fate


class TimeSpent(NamedTuple):
    """``expert`` is -1 where the part has none; ``late``: a wait for what was read ahead."""

    began: int
    ended: int
    part: Part
    layer: int
    expert: int = -1
    late: bool = False


class PredictionMade(NamedTuple):
    """Asked at ``moment`` of MoE layer ``layer``: experts of ``target`` (from L on: of the next token), best first."""

    at: int
    layer: int
    moment: Moment
    target: int
    experts: tuple[int, ...]


class ControllerDecided(NamedTuple):
    """Before a decode step. ``speculating`` is also true for a probe while switched off."""

    at: int
    enabled: bool
    speculating: bool
    reason: str


class PassBegan(NamedTuple):
    """A forward pass over ``tokens`` tokens begins; ``position`` is that of the first."""

    at: int
    phase: Phase
    position: int
    tokens: int


class TokenMade(NamedTuple):
    """A pass and its sampling, from ``began`` to ``ended``, gave ``step``."""

    began: int
    ended: int
    step: GenerationStep


Event = (
    ExpertUsed
    | ReadSubmitted
    | ReadEnded
    | ExpertMoved
    | SpeculationEnded
    | TimeSpent
    | PredictionMade
    | ControllerDecided
    | PassBegan
    | TokenMade
)


class EventListener(Protocol):
    """Called on the generating thread: what it does, the tokens wait for."""

    def on_event(self, event: Event) -> None: ...


class EventSorter:
    """An ``EventListener`` that hands each event to the method of its kind. Override those of interest."""

    def on_event(self, event: Event) -> None:
        getattr(self, _METHODS[type(event)])(event)

    def expert_used(self, event: ExpertUsed) -> None: ...

    def read_submitted(self, event: ReadSubmitted) -> None: ...

    def read_ended(self, event: ReadEnded) -> None: ...

    def expert_moved(self, event: ExpertMoved) -> None: ...

    def speculation_ended(self, event: SpeculationEnded) -> None: ...

    def time_spent(self, event: TimeSpent) -> None: ...

    def prediction_made(self, event: PredictionMade) -> None: ...

    def controller_decided(self, event: ControllerDecided) -> None: ...

    def pass_began(self, event: PassBegan) -> None: ...

    def token_made(self, event: TokenMade) -> None: ...


_METHODS = {kind: re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower() for kind in get_args(Event)}


class EventHub:
    """Hands events to listeners. Emit behind ``if hub.on``. A listener that raises is dropped, with a warning."""

    def __init__(self) -> None:
        self.on = False
        self._listeners: list[EventListener] = []

    def add(self, listener: EventListener) -> None:
        self._listeners.append(listener)
        self.on = True

    def remove(self, listener: EventListener) -> None:
        """Nothing happens if it does not listen."""
        if listener in self._listeners:
            self._listeners.remove(listener)
        self.on = bool(self._listeners)

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Nobody hears what happens inside."""
        heard, self._listeners, self.on = self._listeners, [], False
        try:
            yield
        finally:
            self._listeners, self.on = heard, bool(heard)

    def emit(self, event: Event) -> None:
        for listener in tuple(self._listeners):
            try:
                listener.on_event(event)
            except Exception as error:  # watching must not decide whether the text comes out
                log.warning("listener %s dropped: %s: %s", type(listener).__name__, type(error).__name__, error)
                self.remove(listener)


class _Silence(EventHub):
    def add(self, listener: EventListener) -> None:
        raise TypeError(f"{listener} must listen to an engine's own hub")


SILENCE = _Silence()
"""The hub of parts that nobody watches."""


def ns(seconds: float) -> int:
    """``time.perf_counter`` as ``time.perf_counter_ns``: the same clock."""
    return round(seconds * 1e9)
