"""A listener that writes a run as a timeline file, token by token, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from foregate import events
from foregate.events import EventSorter, Fate, Move, Part, PredictionMade, ReadEnded
from foregate.timeline import tracks
from foregate.timeline.tracefile import TraceFile
from foregate.types import ExpertKey, Phase

_HELD = {
    Move.LOADING: "loading",
    Move.PROMOTED: "loading",
    Move.STAGED: "staged",
    Move.RESIDENT: "resident",
    Move.ADOPTED: "resident",
}
_SHOWN = 16
"""Predicted experts listed for a layer; a ranking may be of all of them."""


class TimelineRecorder(EventSorter):
    """Listens to an engine. A context manager: the file is whole once it has been left.

    ``slot_bytes`` turns experts into bytes; ``about`` is kept beside the events, as ``otherData``. Raises ConfigError
    where ``path`` cannot be written.
    """

    def __init__(self, path: Path, *, slot_bytes: int, about: Mapping[str, Any]) -> None:
        self.about = {**about, "slot_bytes": slot_bytes}
        self._out = TraceFile(path)
        self._slot_bytes = slot_bytes
        self._readers: set[int] = set()
        self._phase = Phase.PREFILL
        self._predicted: list[PredictionMade] = []
        self._state: dict[ExpertKey, str] = {}
        self._fate: dict[ExpertKey, Fate] = {}
        self._unjudged: dict[ExpertKey, ReadEnded] = {}
        # Of every speculative read that a prediction led to: when it was submitted, and where its reading began.
        self._asked: dict[ExpertKey, int] = {}
        self._reading: dict[ExpertKey, tuple[int, int]] = {}
        for track, name in tracks.TRACKS.items():
            self._out.track(track, name)

    def __enter__(self) -> TimelineRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._out.close(self.about | {"readers": len(self._readers)})

    def prediction_made(self, event: PredictionMade) -> None:
        self._predicted.append(event)

    def controller_decided(self, event: events.ControllerDecided) -> None:
        args = {"speculating": event.speculating, "reason": event.reason}
        self._out.instant(tracks.PREDICTIONS, "controller", event.at, args)

    def pass_began(self, event: events.PassBegan) -> None:
        self._phase = event.phase

    def time_spent(self, event: events.TimeSpent) -> None:
        match event.part:
            case Part.WAIT:
                name = tracks.LATE_WAIT if event.late else tracks.DEMAND_WAIT
                self._out.slice(tracks.WAITS, name, event.began, event.ended, _expert(event.layer, event.expert))
            case Part.PREDICT:
                self._predict(event)
            case Part.EXPERT:
                args = _expert(event.layer, event.expert)
                self._out.slice(tracks.COMPUTE, "expert", event.began, event.ended, args)
                self._arrow(ExpertKey(event.layer, event.expert), event.began)
            case part:
                self._out.slice(tracks.COMPUTE, part.value, event.began, event.ended, {"layer": event.layer})
                self._memory(event.ended)

    def _predict(self, event: events.TimeSpent) -> None:
        named = {str(p.target): [int(e) for e in p.experts[:_SHOWN]] for p in self._predicted}
        self._predicted.clear()
        args = {"layer": event.layer, "predicted": named}
        self._out.slice(tracks.PREDICTIONS, tracks.PREDICT, event.began, event.ended, args)

    def read_submitted(self, event: events.ReadSubmitted) -> None:
        self._asked.pop(event.key, None)
        self._reading.pop(event.key, None)
        self._fate.pop(event.key, None)
        # In a prompt whole layers are read ahead: no prediction, no arrow.
        if event.speculative and self._phase is Phase.DECODE:
            self._asked[event.key] = event.at

    def read_ended(self, event: ReadEnded) -> None:
        """A read ahead is written once its fate is known, before the arrow to its use."""
        if event.speculative and event.key not in self._fate:
            self._unjudged[event.key] = event
        else:
            self._read(event)

    def speculation_ended(self, event: events.SpeculationEnded) -> None:
        self._fate[event.key] = event.fate
        ended = self._unjudged.pop(event.key, None)
        if ended is not None:
            self._read(ended)

    def _read(self, event: ReadEnded) -> None:
        name = tracks.SPECULATIVE_READ if event.speculative else tracks.DEMAND_READ
        args: dict[str, Any] = {**_expert(*event.key), "ok": event.ok}
        if event.speculative:
            args["fate"] = self._fate[event.key].value
        for span in event.spans:
            self._out.slice(self._reader(span.reader), name, span.began, span.ended, {**args, "bytes": span.nbytes})
        if event.spans:
            self._reading[event.key] = (self._reader(event.spans[0].reader), event.spans[0].began)

    def _reader(self, reader: int) -> int:
        if reader not in self._readers:
            self._readers.add(reader)
            self._out.track(tracks.READERS + reader, f"reader {reader}")
        return tracks.READERS + reader

    def _arrow(self, key: ExpertKey, used: int) -> None:
        """From the prediction over the read to the first use of ``key``, if a prediction brought it."""
        asked, reading = self._asked.pop(key, None), self._reading.pop(key, None)
        if asked is not None and reading is not None:
            self._out.arrow(tracks.FLOW, [(tracks.PREDICTIONS, asked), reading, (tracks.COMPUTE, used)])

    def expert_moved(self, event: events.ExpertMoved) -> None:
        self._state.pop(event.key, None)
        if event.move in _HELD:
            self._state[event.key] = _HELD[event.move]

    def _memory(self, at: int) -> None:
        held = list(self._state.values())
        series = {name: held.count(name) * self._slot_bytes for name in ("resident", "loading", "staged")}
        self._out.counter(tracks.MEMORY, at, series)

    def token_made(self, event: events.TokenMade) -> None:
        step = event.step
        args = {"index": step.index, "token_id": step.token_id, "text": step.text}
        self._out.slice(tracks.TOKENS, step.phase.value, event.began, event.ended, args)
        self._memory(event.ended)
        self._out.flush()


def _expert(layer: int, expert: int) -> dict[str, Any]:
    return {"expert": f"{layer}.{expert}"}
