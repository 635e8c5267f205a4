"""The prompts that no predictor may have been trained on, as arrays.

Shapes: T decode tokens, P prompt tokens, L MoE layers, k experts chosen by the widest layer, D hidden.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from foregate.analysis.prompt import Shape
from foregate.errors import TraceError
from foregate.predictors.file import ModelIdentity
from foregate.trace.header import ModelInfo
from foregate.trace.manifest import Entry
from foregate.trace.part import WEIGHT, Part
from foregate.trace.reader import TraceReader
from foregate.training.dataset import TEST, side
from foregate.types import Phase, RoutingStep


@dataclass(frozen=True, slots=True)
class HeldPrompt:
    """One prompt. Experts are [·, L, k], best first by router weight, -1 where a layer chooses fewer.

    ``prefill`` and ``prefill_weights`` are of the prompt's own tokens; all else is of the tokens after it.
    ``scores`` [T, L, E] of the routers, None where a trace has none. ``hidden``: feature name → [T, L, D] float32, NaN
    in layers that have none.
    """

    name: str
    domain: str
    prefill: NDArray[np.int32]
    prefill_weights: NDArray[np.float32]
    prefill_ids: NDArray[np.int32]
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]
    token_id: NDArray[np.int32]
    position: NDArray[np.int32]
    hidden: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    scores: NDArray[np.float16] | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.experts)

    def prompt_step(self, layer: int, top_k: int) -> RoutingStep:
        """What the router of ``layer`` chose for the prompt."""
        chosen = self.prefill[:, layer, :top_k].astype(np.int64)
        return RoutingStep(layer, Phase.PREFILL, 0, chosen, self.prefill_weights[:, layer, :top_k])

    def decode_step(self, token: int, layer: int, top_k: int) -> RoutingStep:
        """What it chose for decode token ``token``."""
        chosen = self.experts[token, layer, :top_k].astype(np.int64)[None]
        weights = self.weights[token, layer, :top_k][None]
        return RoutingStep(layer, Phase.DECODE, int(self.position[token]), chosen, weights)


class HeldOut:
    """Traces of one model, opened. ``entries`` are the prompts on the test side of the project's split, which have
    decode tokens (``found``: all prompts); at most ``tokens`` of these in all, whole prompts, every domain in turn.

    Raises TraceError for different models, and where no prompt is left.
    """

    def __init__(self, paths: Sequence[Path], tokens: int | None = None) -> None:
        if not paths:
            raise TraceError("no trace is given")
        self.paths = tuple(paths)
        self.readers = [TraceReader(path) for path in paths]
        self.model: ModelInfo = self.readers[0].header.model
        self.shape = Shape(self.model.experts_per_layer, self.model.top_k)
        for reader in self.readers[1:]:
            if reader.header.model.fingerprint != self.model.fingerprint:
                raise TraceError(
                    f"{reader.path} is a trace of {reader.header.model.name}, {self.readers[0].path} of "
                    f"{self.model.name}: evaluate apart"
                )
        found: dict[str, tuple[TraceReader, Entry]] = {}
        for reader in self.readers:
            for entry in reader.entries:
                found.setdefault(entry.part.xxh3, (reader, entry))
        self.found = list(found.values())
        held = [pair for pair in self.found if side(pair[1]) == TEST and pair[1].decode_tokens > 0]
        self.items = _turns(held, tokens)
        if not self.items:
            places = ", ".join(map(str, paths))
            raise TraceError(
                f"{places}: of {len(found)} prompts none with decode tokens is held out for tests; trace more prompts"
            )

    @property
    def identity(self) -> ModelIdentity:
        """The traced model, as predictor files name it."""
        return ModelIdentity.of_trace(self.model)

    @property
    def prompts_in_all(self) -> int:
        """Of the traces, whatever their side."""
        return len(self.found)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features that every trace has."""
        names = self.readers[0].header.features
        return tuple(name for name in names if all(name in reader.header.features for reader in self.readers))

    @property
    def scored(self) -> bool:
        """Whether every trace has router scores."""
        return all(reader.header.scores is not None for reader in self.readers)

    @property
    def tokens(self) -> int:
        """Decode tokens of the chosen prompts."""
        return sum(entry.decode_tokens for _, entry in self.items)

    @property
    def hash(self) -> str:
        """XXH3-64 of everything that is evaluated: the checksums of its files, whatever their order."""
        sums = sorted(f"{e.part.xxh3} {e.features.xxh3 if e.features is not None else ''}" for _, e in self.items)
        return xxhash.xxh3_64_hexdigest("\n".join(sums).encode())

    def load(self) -> list[HeldPrompt]:
        """Every chosen prompt: about 3 L x D x 4 bytes a token with all features."""
        return [self._prompt(reader, entry) for reader, entry in self.items]

    def _prompt(self, reader: TraceReader, entry: Entry) -> HeldPrompt:
        part = next(iter(reader.parts(prompts=[entry.prompt], order=WEIGHT)))
        experts = part.grid(np.where(np.isnan(part.weights), -1, part.experts.astype(np.int32))).astype(np.int32)
        weights = part.grid(np.nan_to_num(part.weights))
        decode = part.grid(part.decode)[:, 0]
        return HeldPrompt(
            name=entry.prompt,
            domain=entry.domain,
            prefill=experts[~decode],
            prefill_weights=weights[~decode],
            prefill_ids=part.grid(part.token_id)[:, 0][~decode],
            experts=experts[decode],
            weights=weights[decode],
            token_id=part.grid(part.token_id)[:, 0][decode],
            position=part.grid(part.position)[:, 0][decode],
            hidden={name: _feature(part, name, decode) for name in self.features},
            scores=part.grid(part.scores)[decode].astype(np.float16) if self.scored else None,
        )


def _feature(part: Part, name: str, decode: NDArray[np.bool_]) -> NDArray[np.float32]:
    values: NDArray[np.float32] = part.grid(part.feature(name))[decode]
    return values


def _turns(found: Sequence[tuple[TraceReader, Entry]], tokens: int | None) -> list[tuple[TraceReader, Entry]]:
    """Prompts by hash of their text, one of each domain in turn, until ``tokens`` are reached."""
    by_domain: dict[str, list[tuple[TraceReader, Entry]]] = defaultdict(list)
    for pair in sorted(found, key=lambda pair: (pair[1].content, pair[1].prompt)):
        by_domain[pair[1].domain].append(pair)
    chosen: list[tuple[TraceReader, Entry]] = []
    total = 0
    for turn in range(max((len(pairs) for pairs in by_domain.values()), default=0)):
        for pairs in by_domain.values():
            if turn < len(pairs) and (tokens is None or total < tokens):
                chosen.append(pairs[turn])
                total += pairs[turn][1].decode_tokens
    return chosen
