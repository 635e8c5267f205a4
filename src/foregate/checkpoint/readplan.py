"""Which aligned reads bring one expert into memory. Pure arithmetic: no file is touched here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foregate.checkpoint.naming import LayerSources
from foregate.types import ALIGNMENT, Segment, align_up

CHUNK_BYTES = 1 << 20
"""Default size of one read: a demand read waits behind at most this much of every speculative one."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One read: ``nbytes`` of ``path`` at ``offset`` to byte ``at`` of the memory; ``required`` of them must exist."""

    path: str
    offset: int
    nbytes: int
    at: int
    required: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """How to read one expert from the original files. ``places`` says where in the scratch each segment lands."""

    layer: LayerSources
    segments: tuple[Segment, ...]
    places: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    disk_bytes: int


def split(path: str, offset: int, nbytes: int, at: int, required: int, chunk_bytes: int) -> list[Chunk]:
    """Cut the aligned range of ``nbytes`` from ``offset`` into reads of at most ``chunk_bytes``."""
    sizes = [(start, min(chunk_bytes, nbytes - start)) for start in range(0, nbytes, chunk_bytes)]
    return [Chunk(path, offset + s, size, at + s, max(0, min(size, required - s))) for s, size in sizes]


def plan_reads(layer: LayerSources, expert: int, chunk_bytes: int, size_of: Callable[[str], int]) -> ReadPlan:
    """The reads for one expert of ``layer``; ``size_of`` gives the bytes of a file."""
    segments = layer.segments(expert)
    places = [0] * len(segments)
    chunks: list[Chunk] = []
    at = disk_bytes = 0
    for run in _runs(segments):
        path, begin = segments[run[0]].path, segments[run[0]].offset // ALIGNMENT * ALIGNMENT
        required = max(segments[index].offset + segments[index].nbytes for index in run) - begin
        for index in run:
            places[index] = at + segments[index].offset - begin
        chunks += split(path, begin, align_up(required), at, required, chunk_bytes)
        disk_bytes += min(align_up(required), max(required, size_of(path) - begin))
        at += align_up(required)
    return ReadPlan(layer, segments, tuple(places), tuple(chunks), disk_bytes)


def scratch_bytes(layer: LayerSources) -> int:
    """Enough for any expert of ``layer`` wherever its tensors lie: an unaligned range touches one block more."""
    sources = [source for recipe in layer.recipes for source in recipe.sources]
    return sum(align_up(source.largest) + ALIGNMENT for source in sources)


def _runs(segments: Sequence[Segment]) -> list[list[int]]:
    """Indices of ``segments`` that share or touch blocks of one file: one range, so that no block is read twice."""
    order = sorted(range(len(segments)), key=lambda index: (segments[index].path, segments[index].offset))
    runs: list[list[int]] = []
    path, end = "", 0
    for index in order:
        segment = segments[index]
        if runs and segment.path == path and segment.offset // ALIGNMENT * ALIGNMENT <= end:
            runs[-1].append(index)
        else:
            runs.append([index])
            end = 0
        path, end = segment.path, max(end, align_up(segment.offset + segment.nbytes))
    return runs
