"""Experts on disk, read into slots: from the original safetensors files, or from a pack. No budgets, no threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap

from foregate.checkpoint.assemble import assemble
from foregate.checkpoint.naming import LayerSources
from foregate.checkpoint.opening import Checkpoint
from foregate.checkpoint.reader import WeightFiles
from foregate.errors import CheckpointError, ExpertReadError
from foregate.interfaces import ExpertRead, ExpertStore
from foregate.types import ALIGNMENT, ExpertKey, ExpertLayout, Segment, align_up

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


def split(path: str, offset: int, nbytes: int, at: int, required: int, chunk_bytes: int) -> list[Chunk]:
    """Cut the aligned range of ``nbytes`` from ``offset`` into reads of at most ``chunk_bytes``."""
    starts = range(0, nbytes, chunk_bytes)
    sizes = [(start, min(chunk_bytes, nbytes - start)) for start in starts]
    return [Chunk(path, offset + s, size, at + s, max(0, min(size, required - s))) for s, size in sizes]


def open_store(checkpoint: Checkpoint, chunk_bytes: int = CHUNK_BYTES) -> ExpertStore:
    """The store for ``checkpoint``: of its pack if it is one, else of its original files."""
    return DirectStore(checkpoint, chunk_bytes)


class _Store:
    """What both stores share: open files, layouts, and checks of what is asked for."""

    def __init__(self, checkpoint: Checkpoint, paths: Sequence[str], chunk_bytes: int) -> None:
        if chunk_bytes <= 0 or chunk_bytes % ALIGNMENT:
            raise CheckpointError(f"chunk size {chunk_bytes} is not a positive multiple of {ALIGNMENT} bytes")
        self._layouts = checkpoint.layouts
        self._chunk_bytes = chunk_bytes
        self._files = WeightFiles(paths)
        self.slot_bytes = max(layout.nbytes for layout in checkpoint.layouts)

    @property
    def direct_io(self) -> bool:
        """False once the file system has refused O_DIRECT."""
        return self._files.direct_io

    def layout(self, layer: int) -> ExpertLayout:
        """Layout of every expert of MoE layer ``layer``."""
        return self._layouts[layer]

    def close(self) -> None:
        """Close the files. No read may be under way."""
        self._files.close()


class _Read:
    """Chunked reading into ``memory``; what to do with the bytes is for ``finish``."""

    def __init__(self, files: WeightFiles, key: ExpertKey, chunks: Sequence[Chunk], disk_bytes: int) -> None:
        self._files = files
        self._key = key
        self._chunks = chunks
        self.chunks = len(chunks)
        self.disk_bytes = disk_bytes

    def _memory(self) -> memoryview:
        raise NotImplementedError

    def read(self, index: int) -> None:
        """Read chunk ``index``. Raises OSError, or ExpertReadError where the file ends too early."""
        chunk = self._chunks[index]
        count = self._files.read(chunk.path, chunk.offset, self._memory()[chunk.at : chunk.at + chunk.nbytes])
        if count < chunk.required:
            end = chunk.offset + chunk.required
            raise ExpertReadError(f"{self.where(index)}: truncated: expected {end} bytes, found {chunk.offset + count}")

    def where(self, index: int) -> str:
        """File, offset and expert of chunk ``index``."""
        chunk = self._chunks[index]
        return f"{chunk.path} at byte {chunk.offset}, {name_of(self._key)}"


def name_of(key: ExpertKey) -> str:
    """``key`` for messages."""
    return f"expert {key.expert} of MoE layer {key.layer}"


@dataclass(frozen=True, slots=True)
class _Plan:
    """How to read one expert from the original files. ``places`` says where in the scratch each segment lands."""

    layer: LayerSources
    segments: tuple[Segment, ...]
    places: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    disk_bytes: int


class DirectStore(_Store):
    """Experts in the original safetensors files: read with their block surroundings, then assembled into the slot."""

    def __init__(self, checkpoint: Checkpoint, chunk_bytes: int = CHUNK_BYTES) -> None:
        if checkpoint.sources is None:
            raise CheckpointError(f"{checkpoint.directory} is a pack; it has no original tensors to read")
        self._sources = checkpoint.sources
        first = self._sources.segments(ExpertKey(0, 0))
        super().__init__(checkpoint, [first[0].path], chunk_bytes)
        self._plans: dict[ExpertKey, _Plan] = {}
        self.scratch_bytes = max(_scratch_bytes(layer) for layer in self._sources.layers)
        """Bytes of scratch that every read holds from its first chunk until it is finished or dropped."""
        self._scratch = ScratchPool(self.scratch_bytes)

    def begin(self, key: ExpertKey, into: memoryview) -> ExpertRead:
        """Plan a read of ``key`` into ``into``. Reads nothing yet."""
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(key)
        return _DirectRead(self._files, key, plan, self._scratch, into)

    def _plan(self, key: ExpertKey) -> _Plan:
        layer = self._sources.layers[key.layer]
        segments = layer.segments(key.expert)
        places = [0] * len(segments)
        chunks: list[Chunk] = []
        at = disk_bytes = 0
        for run in _runs(segments):
            path, begin = segments[run[0]].path, segments[run[0]].offset // ALIGNMENT * ALIGNMENT
            required = max(segments[index].offset + segments[index].nbytes for index in run) - begin
            for index in run:
                places[index] = at + segments[index].offset - begin
            chunks += split(path, begin, align_up(required), at, required, self._chunk_bytes)
            disk_bytes += min(align_up(required), max(required, self._files.size(path) - begin))
            at += align_up(required)
        return _Plan(layer, segments, tuple(places), tuple(chunks), disk_bytes)


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


def _scratch_bytes(layer: LayerSources) -> int:
    """Enough for any expert of ``layer`` wherever its tensors lie: an unaligned range touches one block more."""
    sources = [source for recipe in layer.recipes for source in recipe.sources]
    return sum(align_up(source.largest) + ALIGNMENT for source in sources)


class ScratchPool:
    """Page-aligned buffers of one size, reused; there are never more than reads active at one time."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._free: list[mmap] = []
        self._lock = threading.Lock()

    def take(self) -> mmap:
        with self._lock:
            return self._free.pop() if self._free else mmap(-1, self._nbytes)

    def give_back(self, buffer: mmap) -> None:
        with self._lock:
            self._free.append(buffer)


class _DirectRead(_Read):
    def __init__(self, files: WeightFiles, key: ExpertKey, plan: _Plan, pool: ScratchPool, into: memoryview) -> None:
        super().__init__(files, key, plan.chunks, plan.disk_bytes)
        self._plan = plan
        self._pool = pool
        self._into = into
        self._lock = threading.Lock()
        self._buffer: mmap | None = None

    def _memory(self) -> memoryview:
        with self._lock:
            if self._buffer is None:
                self._buffer = self._pool.take()
            return memoryview(self._buffer)

    def finish(self) -> None:
        """Assemble the tensors into the slot and give the scratch back."""
        plan, memory = self._plan, self._memory()
        parts = [memory[at : at + s.nbytes] for at, s in zip(plan.places, plan.segments, strict=True)]
        assemble(plan.layer, plan.segments, parts, self._into)
        self._release()

    def _release(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._pool.give_back(buffer)

    def __del__(self) -> None:
        # a cancelled read is dropped without finish()
        self._release()
