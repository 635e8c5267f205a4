"""An engine's events folded into what the page shows: the expert map, the tokens, the counters. No web, no torch.

Messages to browsers are JSON objects with a ``type``: ``snapshot`` (everything), ``delta`` (changes of the map within a
token), ``token`` (one frame), ``status`` (what the session does). An expert is numbered layer by layer: its cell.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from foregate import events
from foregate.events import Event, EventSorter, Fate, Move, Part, Use
from foregate.server.dashboard.channel import Channel
from foregate.server.dashboard.tally import Tally
from foregate.types import ExpertKey, GenerationStep

FRAMES = 64
"""Last tokens that a browser gets when it connects, to scrub back through."""
DELTA_NS = 50_000_000
"""At most one delta in so many nanoseconds: 20 a second."""

DISK, RESIDENT, LOADING, FLYING, STAGED = range(5)
"""States of a cell: on disk only, in memory, demand read running, speculative read running, read ahead."""
_STATES = {
    Move.LOADING: LOADING,
    Move.STAGED: FLYING,
    Move.RESIDENT: RESIDENT,
    Move.ADOPTED: RESIDENT,
    Move.PROMOTED: LOADING,
    Move.EVICTED: DISK,
    Move.DROPPED: DISK,
    Move.ABORTED: DISK,
}
_USES = {Use.HIT: 0, Use.STAGED_HIT: 1, Use.LATE: 2, Use.MISS: 3}
WASTED = 4
"""A mark beside those of ``_USES``: read ahead in vain."""
PARTS = (Part.ATTENTION, Part.ROUTING, Part.EXPERT, Part.WAIT, Part.PREDICT)


class Board(EventSorter):
    """Listens to an engine; ``about`` is what does not change. Thread-safe.

    ``resident`` is in memory already. Without a browser it keeps state and encodes nothing.
    """

    def __init__(self, experts: Sequence[int], about: dict[str, Any], resident: Iterable[ExpertKey] = ()) -> None:
        self._first = [0, *accumulate(experts)]
        self._about = about | {"experts": list(experts), "parts": [part.value for part in PARTS]}
        self._lock = threading.Lock()
        self._channels: list[Channel] = []
        self._state = bytearray(self._first[-1])
        self._heat = [0] * self._first[-1]
        self._status: dict[str, Any] = {"state": "idle", "error": ""}
        self._controller: dict[str, Any] = {}
        self._sent_at = 0
        self._marks_sent = 0
        self._restart("")
        for key in resident:
            self._state[self._cell(key)] = RESIDENT

    # Browsers

    def join(self, channel: Channel) -> None:
        """``channel`` gets a snapshot at its first ``take``, and what happens afterwards."""
        with self._lock:
            self._channels.append(channel)
            channel.put("")

    def leave(self, channel: Channel) -> None:
        with self._lock:
            self._channels.remove(channel)

    def take(self, channel: Channel) -> list[str]:
        """Messages for ``channel``: a snapshot alone where it is new or was too slow."""
        with self._lock:
            stale = channel.stale
            waiting = channel.take()
            return [json.dumps(self._snapshot(), ensure_ascii=False)] if stale else waiting

    @property
    def browsers(self) -> int:
        """How many are connected."""
        return len(self._channels)

    def snapshot(self) -> dict[str, Any]:
        """Everything that the page shows, of this moment."""
        with self._lock:
            return self._snapshot()

    # What the session does

    def begin(self, prompt: str) -> None:
        """A run starts: counters from zero, no tokens. The map and its heat stay."""
        with self._lock:
            self._restart(prompt)
            self._heat = [0] * len(self._heat)
            self._send(self._snapshot())

    def say(self, state: str, error: str = "") -> None:
        """The session is ``state`` now."""
        with self._lock:
            self._status = {"state": state, "error": error}
            self._send({"type": "status", **self._status, "totals": self._tally.as_dict(), "map": self._map()})

    # Events

    def on_event(self, event: Event) -> None:
        """Keeps browsers waiting meanwhile."""
        with self._lock:
            self._tally.on_event(event)
            super().on_event(event)

    def expert_used(self, event: events.ExpertUsed) -> None:
        cell = self._cell(event.key)
        self._heat[cell] += 1
        self._mark(cell, _USES[event.how])

    def expert_moved(self, event: events.ExpertMoved) -> None:
        self._set(event.key, _STATES[event.move])

    def read_ended(self, event: events.ReadEnded) -> None:
        if self._state[self._cell(event.key)] == FLYING and event.ok:
            self._set(event.key, STAGED)

    def speculation_ended(self, event: events.SpeculationEnded) -> None:
        if event.fate is Fate.WASTED:
            self._mark(self._cell(event.key), WASTED)

    def prediction_made(self, event: events.PredictionMade) -> None:
        self._predictions += 1

    def controller_decided(self, event: events.ControllerDecided) -> None:
        self._controller = {"speculating": event.speculating, "reason": event.reason}

    def time_spent(self, event: events.TimeSpent) -> None:
        if event.part in PARTS:
            self._times[event.layer][PARTS.index(event.part)] += event.ended - event.began
        elif self._channels and event.ended - self._sent_at > DELTA_NS:
            self._delta(event)

    def token_made(self, event: events.TokenMade) -> None:
        frame = self._frame(event.step)
        self._frames.append(frame)
        self._text.append(event.step.text)
        self._sent_at = event.ended
        self._send({"type": "token", "frame": frame})
        self._clear_token()

    def _delta(self, event: events.TimeSpent) -> None:
        """After a layer, if the last message is long ago: what has changed within this token."""
        self._sent_at = event.ended
        moves, sent = [[cell, self._state[cell]] for cell in self._moved], self._marks_sent
        marks = self._marks[sent:]
        self._send({"type": "delta", "layer": event.layer, "moves": moves, "from": sent, "marks": marks})
        self._moved.clear()
        self._marks_sent = len(self._marks)

    def _frame(self, step: GenerationStep) -> dict[str, Any]:
        return {
            "index": step.index,
            "text": step.text,
            "token_id": step.token_id,
            "phase": step.phase.value,
            "wall_s": step.stats.wall_s,
            "layers": [[nanoseconds // 1000 for nanoseconds in layer] for layer in self._times],
            "marks": self._marks,
            "map": self._map(),
            "predictions": self._predictions,
            "totals": self._tally.as_dict(),
            "controller": self._controller,
        }

    # Inside

    def _restart(self, prompt: str) -> None:
        self._tally = Tally()
        self._prompt = prompt
        self._frames: deque[dict[str, Any]] = deque(maxlen=FRAMES)
        self._text: list[str] = []
        self._clear_token()

    def _clear_token(self) -> None:
        self._times = [[0] * len(PARTS) for _ in range(len(self._first) - 1)]
        self._marks: list[list[int]] = []
        self._marks_sent = 0
        self._moved: set[int] = set()
        self._predictions = 0

    def _cell(self, key: ExpertKey) -> int:
        return self._first[key.layer] + key.expert

    def _mark(self, cell: int, what: int) -> None:
        self._marks.append([cell, what])

    def _set(self, key: ExpertKey, state: int) -> None:
        cell = self._cell(key)
        self._state[cell] = state
        self._moved.add(cell)

    def _map(self) -> str:
        """One digit a cell."""
        return "".join(map(str, self._state))

    def _snapshot(self) -> dict[str, Any]:
        return {
            "type": "snapshot",
            "about": self._about,
            "status": self._status,
            "prompt": self._prompt,
            "text": self._text,
            "frames": list(self._frames),
            "heat": self._heat,
            "map": self._map(),
            "marks": self._marks,
            "totals": self._tally.as_dict(),
            "controller": self._controller,
        }

    def _send(self, message: dict[str, Any]) -> None:
        if self._channels:
            encoded = json.dumps(message, ensure_ascii=False)
            for channel in self._channels:
                channel.put(encoded)
