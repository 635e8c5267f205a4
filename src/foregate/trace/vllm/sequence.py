"""What was routed of one request so far.

Shapes: n tokens of a pass, T tokens of a request, L MoE layers, k width of the expert lists, E of the score lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from foregate.errors import TraceError
from foregate.trace import format as fmt
from foregate.trace.record import Array, PromptRecord


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that one pass gave a request, from position ``first`` on.

    ``token_ids`` [n], ``experts`` and ``weights`` [n, L, k], ``scores`` [n, L, E] or None, ``timings`` [L] nanoseconds
    (-1: noted elsewhere).
    """

    number: int
    first: int
    token_ids: Array
    experts: Array
    weights: Array
    scores: Array | None
    timings: dict[str, NDArray[np.int64]]

    @property
    def end(self) -> int:
        return self.first + len(self.token_ids)

    def until(self, position: int) -> Chunk:
        """The part before ``position``."""
        keep = slice(0, position - self.first)
        scores = None if self.scores is None else self.scores[keep]
        return replace(
            self,
            token_ids=self.token_ids[keep],
            experts=self.experts[keep],
            weights=self.weights[keep],
            scores=scores,
        )


@dataclass(slots=True)
class RoutedSequence:
    """A request: ``prompt_tokens`` tokens were given, the rest generated. ``request`` is vLLM's internal id."""

    request: str
    prompt_tokens: int
    chunks: list[Chunk] = field(default_factory=list)
    passes: int = 0

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """T, in order of position, from 0."""
        return np.concatenate([chunk.token_ids for chunk in self.chunks]) if self.chunks else np.zeros(0, np.int64)

    @property
    def whole(self) -> bool:
        """Whether all of the prompt was routed."""
        return bool(self.chunks) and self.chunks[-1].end >= self.prompt_tokens

    def add(self, chunk: Chunk) -> None:
        """Append a pass. Tokens that are routed again (a request that was preempted) replace their first routing.

        Raises TraceError where tokens before ``chunk`` were never routed.
        """
        while self.chunks and self.chunks[-1].first >= chunk.first:
            self.chunks.pop()
        if self.chunks and self.chunks[-1].end > chunk.first:
            self.chunks[-1] = self.chunks[-1].until(chunk.first)
        end = self.chunks[-1].end if self.chunks else 0
        if end != chunk.first:
            raise TraceError(f"vLLM: request {self.request!r}: positions {end} to {chunk.first - 1} were not routed")
        self.chunks.append(chunk)
        self.passes += 1

    def to_record(self, prompt: str, domain: str) -> PromptRecord:
        """The rows, under the name ``prompt``."""
        first = np.cumsum([0, *(len(chunk.token_ids) for chunk in self.chunks[:-1])])
        tokens = self.token_ids
        positions = np.arange(len(tokens))
        scores = [chunk.scores for chunk in self.chunks if chunk.scores is not None]
        return PromptRecord(
            prompt=prompt,
            domain=domain,
            positions=positions,
            token_ids=tokens,
            decode=positions >= self.prompt_tokens,
            passes=np.repeat([chunk.number for chunk in self.chunks], [len(chunk.token_ids) for chunk in self.chunks]),
            experts=np.concatenate([chunk.experts for chunk in self.chunks]),
            weights=np.concatenate([chunk.weights for chunk in self.chunks]),
            scores=np.concatenate(scores) if scores else None,
            timings={name: self._timing(name, first) for name in self.chunks[0].timings},
        )

    def _timing(self, name: str, first: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """[T, L]: of each pass in the row of its first token."""
        found = np.full((len(self.token_ids), self.chunks[0].experts.shape[1]), fmt.NOT_MEASURED, np.int64)
        found[first] = [chunk.timings[name] for chunk in self.chunks]
        return found
