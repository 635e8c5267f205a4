"""A timeline file back into spans, and what they say about overlap."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from foregate.errors import ConfigError
from foregate.timeline import tracks


class Slice(NamedTuple):
    """Microseconds since the start of the file."""

    track: int
    name: str
    began: float
    ended: float
    args: dict[str, Any]


class Arrow(NamedTuple):
    """Prediction → read → use: (track, microseconds) each."""

    points: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Timeline:
    """Slices in order of their begin, arrows, and what the file says about its run."""

    slices: list[Slice] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def on(self, track: int) -> list[Slice]:
        """The slices of one track."""
        return [piece for piece in self.slices if piece.track == track]

    @property
    def readers(self) -> list[int]:
        """Tracks of reader threads."""
        return sorted({piece.track for piece in self.slices if piece.track >= tracks.READERS})

    def cut(self, began: float, ended: float) -> Timeline:
        """What touches the time from ``began`` to ``ended``."""
        slices = [piece for piece in self.slices if piece.ended > began and piece.began < ended]
        arrows = [arrow for arrow in self.arrows if all(began <= at <= ended for _, at in arrow.points)]
        return Timeline(slices, arrows, self.about)

    def overlap(self, began: float, ended: float) -> dict[str, float]:
        """Seconds from ``began`` to ``ended`` in which any reader read, in which the model waited, and of the reading
        what was hidden: it neither waited nor was between tokens."""
        reads = _union(piece[2:4] for piece in self.slices if piece.track >= tracks.READERS)
        waits = _union(piece[2:4] for piece in self.on(tracks.WAITS))
        window = [(began, ended)]
        reading = _meet(reads, window)
        waited = _meet(waits, window)
        hidden = _length(reading) - _length(_meet(reading, waited))
        seconds = {"window_s": ended - began, "reading_s": _length(reading), "waiting_s": _length(waited)}
        return {name: value / 1e6 for name, value in (seconds | {"hidden_s": hidden}).items()}


def read_timeline(path: Path) -> Timeline:
    """Raises ConfigError where ``path`` is not a timeline that Foregate wrote to its end."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        events, about = content["traceEvents"], content["otherData"]
        timeline = Timeline(about=about)
        points: dict[int, list[tuple[int, float]]] = {}
        for event in events:
            if event["ph"] == "X":
                ended = event["ts"] + event["dur"]
                timeline.slices.append(Slice(event["tid"], event["name"], event["ts"], ended, event["args"]))
            elif event["ph"] in "stf":
                points.setdefault(event["id"], []).append((event["tid"], event["ts"]))
    except OSError as error:
        raise ConfigError(f"cannot read the timeline {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no whole timeline of foregate run --trace-events: {type(error).__name__}"
        ) from error
    timeline.slices.sort(key=lambda piece: (piece.began, -piece.ended))
    timeline.arrows = [Arrow(tuple(flow)) for flow in points.values()]
    return timeline


Spans = list[tuple[float, float]]


def _union(spans: Iterable[Any]) -> Spans:
    """Disjoint spans in order that cover the same time."""
    merged: Spans = []
    for began, ended in sorted(spans):
        if merged and began <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], ended))
        else:
            merged.append((began, ended))
    return merged


def _meet(a: Spans, b: Spans) -> Spans:
    """The time in both; both disjoint and in order."""
    met = [(max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b]
    return [(began, ended) for began, ended in met if began < ended]


def _length(spans: Spans) -> float:
    return sum(ended - began for began, ended in spans)
