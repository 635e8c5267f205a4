"""The traces of an analysis as one stream of prompts, with the split into train and test. One prompt in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from foregate.analysis.prompt import Prompt, Shape
from foregate.analysis.settings import Settings
from foregate.errors import TraceError
from foregate.trace.manifest import Entry
from foregate.trace.part import Part
from foregate.trace.reader import TraceReader

OnPart = Callable[[int], None]
"""Told the rows (tokens x layers) of every part that has been dealt with."""


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt to read, and what it is used for."""

    reader: TraceReader
    entry: Entry
    test: bool
    replayed: bool
    compared: bool


class Source:
    """Opens the traces. The same file in two traces is read once; every prompt text is on one side of the split.

    Raises TraceError for no prompt at all and for traces of different models.
    """

    def __init__(self, paths: Sequence[Path], settings: Settings) -> None:
        self.settings = settings
        self.readers = [TraceReader(path) for path in paths]
        first = self.readers[0].header.model
        for reader in self.readers[1:]:
            model = reader.header.model
            if model.fingerprint != first.fingerprint:
                raise TraceError(f"{reader.path} is a trace of {model.name}, {paths[0]} of {first.name}: analyse apart")
        self.model = first
        self.shape = Shape(first.experts_per_layer, first.top_k)
        self.items = self._items()

    def __iter__(self) -> Iterator[Prompt]:
        return self.prompts()

    @property
    def rows(self) -> int:
        """Routing decisions (tokens x MoE layers) before ``phase`` is applied."""
        return sum(item.entry.rows for item in self.items)

    @property
    def domains(self) -> tuple[str, ...]:
        """In order of appearance."""
        return tuple(dict.fromkeys(item.entry.domain for item in self.items))

    def prompts(self, *, test_only: bool = False, on_part: OnPart = lambda rows: None) -> Iterator[Prompt]:
        """Every prompt that has tokens of the wanted phase, in order."""
        for reader in self.readers:
            mine = [
                (index, item)
                for index, item in enumerate(self.items)
                if item.reader is reader and (item.test or not test_only)
            ]
            yield from self._of(reader, mine, on_part)

    def _of(self, reader: TraceReader, items: list[tuple[int, Item]], on_part: OnPart) -> Iterator[Prompt]:
        """Prompts of one trace. The reader gives them in the order of its manifest, which is that of ``items``."""
        phases = None if self.settings.phase == "all" else (self.settings.phase,)
        names = {item.entry.prompt for _, item in items}
        for (index, item), part in zip(items, reader.parts(prompts=names, phases=phases, order="weight"), strict=True):
            if _tokens(item.entry, self.settings.phase):
                yield _prompt(index, item, part, self.shape)
            on_part(item.entry.rows)

    def _items(self) -> list[Item]:
        found: dict[str, tuple[TraceReader, Entry]] = {}
        for reader in self.readers:
            for entry in reader.entries:
                found.setdefault(entry.part.xxh3, (reader, entry))
        entries = [entry for _, entry in found.values()]
        if not entries:
            raise TraceError(
                f"{', '.join(str(reader.path) for reader in self.readers)}: no prompts, nothing to analyse"
            )
        test = _test_contents(entries, self.settings)
        compared = _first_of_each_domain(entries, self.settings)
        replayed = _replayed(entries, self.settings, self.shape.layers)
        return [
            Item(reader, entry, entry.content in test, key in replayed, key in compared)
            for key, (reader, entry) in found.items()
        ]


def _tokens(entry: Entry, phase: str) -> int:
    if phase == "all":
        return entry.tokens
    return entry.decode_tokens if phase == "decode" else entry.tokens - entry.decode_tokens


def _place(text: str, seed: int) -> int:
    return int(xxhash.xxh3_64_intdigest(text.encode(), seed=seed))


def _test_contents(entries: Iterable[Entry], settings: Settings) -> set[str]:
    """Of every domain, the contents with the lowest hashes: the share asked for, at least one if there are two."""
    contents: dict[str, set[str]] = defaultdict(set)
    seen: set[str] = set()
    for entry in entries:
        if entry.content not in seen:
            seen.add(entry.content)
            contents[entry.domain].add(entry.content)
    chosen: set[str] = set()
    for found in contents.values():
        if len(found) > 1 or len(contents) == 1:
            number = min(len(found) - 1, max(1, round(len(found) * settings.test_share)))
            chosen |= set(sorted(found, key=lambda text: _place(text, settings.seed))[:number])
    return chosen


def _first_of_each_domain(entries: Iterable[Entry], settings: Settings) -> set[str]:
    """Checksums of the prompts that the comparison of domains uses."""
    by_domain: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_domain[entry.domain].append(entry)
    ordered = (
        sorted(found, key=lambda e: _place(e.part.xxh3, settings.seed))[: settings.domain_prompts]
        for found in by_domain.values()
    )
    return {entry.part.xxh3 for found in ordered for entry in found}


def _replayed(entries: Iterable[Entry], settings: Settings, layers: int) -> set[str]:
    """Checksums of the prompts that are replayed: by hash, until the events that they give reach the limit."""
    chosen: set[str] = set()
    events = 0
    for entry in sorted(entries, key=lambda e: _place(e.part.xxh3, settings.seed + 1)):
        chosen.add(entry.part.xxh3)
        events += (entry.decode_tokens + 1) * layers
        if events >= settings.replay_events:
            break
    return chosen


def _prompt(index: int, item: Item, part: Part, shape: Shape) -> Prompt:
    grid = part.grid(part.experts).astype(np.int32)
    for layer, top_k in enumerate(shape.top_k):
        grid[:, layer, top_k:] = -1
    names = item.reader.header.timings
    scored = item.replayed and item.reader.header.scores is not None
    return Prompt(
        index=index,
        domain=item.entry.domain,
        test=item.test,
        replayed=item.replayed,
        compared=item.compared,
        experts=grid,
        decode=part.grid(part.decode)[:, 0],
        passes=part.grid(part.pass_index)[:, 0],
        timings={name: part.grid(part.timing(name)) for name in names},
        scores=part.grid(part.scores).astype(np.float16) if scored else None,
    )
