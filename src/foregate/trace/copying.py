"""Traces out of traces: merging several, and splitting one by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import xxhash

from foregate.errors import TraceError
from foregate.trace.header import Header
from foregate.trace.manifest import Entry
from foregate.trace.reader import TraceReader
from foregate.trace.writer import TraceWriter, check_out

SIDES = ("train", "validation", "test")


def merge(sources: Sequence[Path], out: Path) -> int:
    """Copy the prompts of all ``sources`` into one new trace; returns their number.

    Raises TraceError for traces of different models or columns, for a prompt that two of them have with different
    content (the same file twice is taken once), and for anything corrupted.
    """
    readers = [TraceReader(path) for path in sources]
    first = readers[0]
    for reader in readers[1:]:
        _check_alike(first, reader)
    check_out(out, resume=False)
    chosen: dict[str, tuple[TraceReader, Entry]] = {}
    runs: list[int] = []
    for reader in readers:
        for entry in reader.entries:
            there = chosen.setdefault(entry.prompt, (reader, entry))[1]
            if there.part.xxh3 != entry.part.xxh3:
                raise TraceError(f"{reader.path}: prompt {entry.prompt!r} is in {chosen[entry.prompt][0].path} as well")
        runs.append(len(reader.header.runs))
    offsets = {id(reader): sum(runs[:number]) for number, reader in enumerate(readers)}
    header = replace(first.header, runs=tuple(run for reader in readers for run in reader.header.runs))
    shifted = [(reader, replace(entry, run=entry.run + offsets[id(reader)])) for reader, entry in chosen.values()]
    _copy(header, shifted, out)
    return len(shifted)


def split(source: Path, out: Path, fractions: Sequence[float], seed: int) -> dict[str, int]:
    """Copy a trace into ``out``/train, /validation and /test; returns the prompts of each.

    A prompt goes where the hash of its token ids (not of its name) and ``seed`` put it: the same text is always on
    the same side, in every trace. Raises TraceError where a part with a fraction above 0 would be empty.
    """
    if len(fractions) != len(SIDES) or not min(fractions) >= 0 or not abs(sum(fractions) - 1) < 1e-6:
        raise TraceError(f"fractions {list(fractions)} must be {len(SIDES)} numbers from 0 on that sum to 1")
    reader = TraceReader(source)
    check_out(out, resume=False)
    sides: dict[str, list[tuple[TraceReader, Entry]]] = {name: [] for name in SIDES}
    for entry in reader.entries:
        sides[side_of(entry.content, fractions, seed)].append((reader, entry))
    for name, fraction in zip(SIDES, fractions, strict=True):
        if fraction and not sides[name]:
            raise TraceError(f"{source}: of {len(reader)} prompts none would be in {name} ({fraction:g}); trace more")
    for name, fraction in zip(SIDES, fractions, strict=True):
        if fraction:
            _copy(reader.header, sides[name], out / name)
    return {name: len(entries) for name, entries in sides.items()}


def side_of(content: str, fractions: Sequence[float], seed: int) -> str:
    """train, validation or test, for a prompt whose token ids hash to ``content``."""
    place = xxhash.xxh3_64_intdigest(content.encode(), seed=seed) / 2**64
    return SIDES[0] if place < fractions[0] else SIDES[1] if place < fractions[0] + fractions[1] else SIDES[2]


def _check_alike(first: TraceReader, other: TraceReader) -> None:
    mine, theirs = first.header.model, other.header.model
    if mine.fingerprint != theirs.fingerprint:
        message = f"{other.path} is a trace of {theirs.name} ({theirs.fingerprint})"
        raise TraceError(f"{message}, {first.path} of {mine.name} ({mine.fingerprint}); they cannot be merged")
    if first.header.layout != other.header.layout:
        raise TraceError(f"{other.path} has other columns, features or tokenizer than {first.path}")


def _copy(header: Header, entries: Sequence[tuple[TraceReader, Entry]], out: Path) -> None:
    """A new trace with the files of ``entries``, each checked against its checksum on the way."""
    with TraceWriter(out) as writer:
        writer.begin(replace(header, complete=None))
        for reader, entry in entries:
            features = reader.content(entry.features) if entry.features else None
            writer.adopt(entry, reader.content(entry.part), features)
        writer.finish()
