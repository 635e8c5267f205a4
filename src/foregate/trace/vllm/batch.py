"""Which rows of a pass belong to which request, from what vLLM's scheduler hands to its workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.errors import TraceError


@dataclass(frozen=True, slots=True)
class Span:
    """``count`` rows from ``row`` on are tokens of ``request`` (vLLM's internal id), from position ``first`` on."""

    request: str
    row: int
    count: int
    first: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.count)


def spans(scheduled: Any, order: Sequence[str]) -> list[Span]:
    """Spans of a pass. ``scheduled`` is a SchedulerOutput; ``order`` are the requests as they lie in the batch."""
    first = dict(_starts(scheduled))
    found, row = [], 0
    for request in order:
        count = int(scheduled.num_scheduled_tokens[request])
        found.append(Span(request, row, count, first[request]))
        row += count
    if row != scheduled.total_num_scheduled_tokens:
        raise TraceError(f"vLLM scheduled {scheduled.total_num_scheduled_tokens} tokens; its batch holds {row}")
    return found


def check_positions(found: Sequence[Span], positions: NDArray[np.int64]) -> None:
    """Raises TraceError where the positions [R] that the model was given are not those of the spans."""
    for span in found:
        given = positions[span.rows]
        if not np.array_equal(given, np.arange(span.first, span.first + span.count)):
            message = f"request {span.request!r}: positions {given[:3]} … were expected to begin at {span.first}"
            raise TraceError(f"vLLM: {message}; rows cannot be told apart")


def _starts(scheduled: Any) -> Iterator[tuple[str, int]]:
    """Request → position of its first token in this pass."""
    yield from ((new.req_id, int(new.num_computed_tokens)) for new in scheduled.scheduled_new_reqs)
    cached = scheduled.scheduled_cached_reqs
    yield from zip(cached.req_ids, map(int, cached.num_computed_tokens), strict=True)
