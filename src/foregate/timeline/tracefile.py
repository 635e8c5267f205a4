"""Writes Chrome's Trace Event Format, as Perfetto and chrome://tracing open it. Knows no experts.

A finished file is ``{"traceEvents": […], "otherData": {…}}``. Times come in nanoseconds and are written as microseconds
since the file was opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from foregate.errors import ConfigError

PROCESS = 1


class TraceFile:
    """Keeps lines until ``flush``. Raises ConfigError where ``path`` cannot be written."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write the timeline {path}: {error.strerror}") from error
        self._zero = perf_counter_ns()
        self._lines: list[str] = []
        self._flows = 0
        self._separator = ""
        self._file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        self._line("M", 0, None, name="process_name", args={"name": "foregate"})

    def track(self, track: int, name: str) -> None:
        """Name a track; they are shown in the order of their numbers."""
        self._line("M", track, None, name="thread_name", args={"name": name})
        self._line("M", track, None, name="thread_sort_index", args={"sort_index": track})

    def slice(self, track: int, name: str, began: int, ended: int, args: dict[str, Any]) -> None:
        # Both ends are rounded alike, then subtracted: a slice does not outlast the one around it.
        duration = round(self._us(ended) - self._us(began), 3)
        self._line("X", track, began, name=name, dur=duration, args=args)

    def instant(self, track: int, name: str, at: int, args: dict[str, Any]) -> None:
        self._line("i", track, at, name=name, s="t", args=args)

    def counter(self, name: str, at: int, series: dict[str, int]) -> None:
        self._line("C", 0, at, name=name, args=series)

    def arrow(self, name: str, points: list[tuple[int, int]]) -> None:
        """An arrow through two or more (track, time), each inside a slice of its track."""
        self._flows += 1
        for (track, at), step in zip(points, "s" + "t" * (len(points) - 2) + "f", strict=True):
            binding = {"bp": "e"} if step == "f" else {}
            self._line(step, track, at, name=name, cat="flow", id=self._flows, **binding)

    def flush(self) -> None:
        """Write what is kept."""
        if self._lines:
            self._file.write(self._separator + ",\n".join(self._lines))
            self._separator = ",\n"
            self._lines.clear()

    def close(self, other: dict[str, Any]) -> None:
        """End the file, with ``other`` beside the events."""
        if not self._file.closed:
            self.flush()
            self._file.write('\n],\n"otherData":' + json.dumps(other, ensure_ascii=False) + "}\n")
            self._file.close()

    def _line(self, phase: str, track: int, at: int | None, **fields: Any) -> None:
        when = {} if at is None else {"ts": self._us(at)}
        record = {"ph": phase, "pid": PROCESS, "tid": track, **when, **fields}
        self._lines.append(json.dumps(record, ensure_ascii=False, separators=(",", ":")))

    def _us(self, at: int) -> float:
        return round((at - self._zero) / 1e3, 3)
