"""Experts on disk, read into slots: from the original safetensors files, or from a pack. No budgets, no threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from mmap import mmap

import xxhash

from foregate.checkpoint.assemble import assemble
from foregate.checkpoint.manifest import EXPERTS_FILE, PackedExpert
from foregate.checkpoint.opening import Checkpoint
from foregate.checkpoint.reader import WeightFiles
from foregate.checkpoint.readplan import CHUNK_BYTES, Chunk, ReadPlan, plan_reads, scratch_bytes, split
from foregate.errors import CheckpointError, ExpertReadError
from foregate.experts.native_transfer import Place
from foregate.interfaces import ExpertRead, ExpertStore
from foregate.types import ALIGNMENT, ExpertKey, ExpertLayout

IDLE_BUFFERS = 8
"""Scratch buffers kept for the next reads: twice the usual four reader threads."""


def open_store(checkpoint: Checkpoint, chunk_bytes: int = CHUNK_BYTES) -> ExpertStore:
    """The store for ``checkpoint``: of its pack if it is one, else of its original files."""
    return PackedStore(checkpoint, chunk_bytes) if checkpoint.packed else DirectStore(checkpoint, chunk_bytes)


class _Store:
    """What both stores share: open files, layouts, and checks of what is asked for."""

    def __init__(self, checkpoint: Checkpoint, paths: Sequence[str], chunk_bytes: int) -> None:
        if chunk_bytes <= 0 or chunk_bytes % ALIGNMENT:
            raise CheckpointError(f"chunk size {chunk_bytes} is not a positive multiple of {ALIGNMENT} bytes")
        self._layouts = checkpoint.layouts
        self._chunk_bytes = chunk_bytes
        try:
            self._files = WeightFiles(paths)
        except OSError as error:
            raise CheckpointError(f"{paths[0]}: cannot be read: {error.strerror}") from error
        self.slot_bytes = checkpoint.spec.expert_slot_bytes

    @property
    def direct_io(self) -> bool:
        """False once the file system has refused O_DIRECT."""
        return self._files.direct_io

    def layout(self, layer: int) -> ExpertLayout:
        """Layout of every expert of MoE layer ``layer``, but for those that a pack keeps finer than the others."""
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
            end, size = chunk.offset + chunk.required, self._files.size(chunk.path)
            raise ExpertReadError(f"{self.where(index)}: truncated: expected {end} bytes, found {size}")

    def where(self, index: int) -> str:
        """File, offset and expert of chunk ``index``."""
        chunk = self._chunks[index]
        return f"{chunk.path} at byte {chunk.offset}, {name_of(self._key)}"


def name_of(key: ExpertKey) -> str:
    """``key`` for messages."""
    return f"expert {key.expert} of MoE layer {key.layer}"


class DirectStore(_Store):
    """Experts in the original safetensors files: read with their block surroundings, then assembled into the slot."""

    def __init__(self, checkpoint: Checkpoint, chunk_bytes: int = CHUNK_BYTES) -> None:
        if checkpoint.sources is None:
            raise CheckpointError(f"{checkpoint.directory} is a pack; it has no original tensors to read")
        self._sources = checkpoint.sources
        first = self._sources.segments(ExpertKey(0, 0))
        super().__init__(checkpoint, [first[0].path], chunk_bytes)
        self._plans: dict[ExpertKey, ReadPlan] = {}
        self.scratch_bytes = max(scratch_bytes(layer) for layer in self._sources.layers)
        """Bytes of scratch that every read holds from its first chunk until it is finished or dropped."""
        self._scratch = ScratchPool(self.scratch_bytes)

    def begin(self, key: ExpertKey, into: memoryview) -> ExpertRead:
        """Plan a read of ``key`` into ``into``. Reads nothing yet."""
        plan = self._plans.get(key)
        if plan is None:
            layer = self._sources.layers[key.layer]
            plan = plan_reads(layer, key.expert, self._chunk_bytes, self._files.size)
            self._plans[key] = plan
        return _DirectRead(self._files, key, plan, self._scratch, into)

    def close(self) -> None:
        """Close the files and release the scratch. No read may be under way."""
        super().close()
        self._scratch.close()


class ScratchPool:
    """Page-aligned buffers of one size, reused; at most ``IDLE_BUFFERS`` are kept while nobody uses them.

    A read holds one from its first chunk until it is finished or dropped. A transfer takes chunks first in, first out
    in each of its two priorities, so of T reader threads at most 2 T reads hold one at a time, besides cancelled reads
    whose owners still keep their tickets.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._free: list[mmap] = []
        self._lock = threading.Lock()
        self._closed = False

    def take(self) -> mmap:
        with self._lock:
            return self._free.pop() if self._free else mmap(-1, self._nbytes)

    def give_back(self, buffer: mmap) -> None:
        with self._lock:
            if not self._closed and len(self._free) < IDLE_BUFFERS:
                self._free.append(buffer)

    def close(self) -> None:
        """Keep nothing from now on. Memory goes as the last view of it does: a read under way loses nothing."""
        with self._lock:
            self._closed = True
            self._free.clear()


class _DirectRead(_Read):
    _buffer: mmap | None = None

    def __init__(self, files: WeightFiles, key: ExpertKey, plan: ReadPlan, pool: ScratchPool, into: memoryview) -> None:
        super().__init__(files, key, plan.chunks, plan.disk_bytes)
        self._plan = plan
        self._pool = pool
        self._into = into
        self._lock = threading.Lock()

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
        # a cancelled read is dropped without finish(); one whose __init__ was interrupted has taken nothing
        self._release()


class PackedStore(_Store):
    """Experts in a pack: read straight into the slot, and checked against the manifest."""

    scratch_bytes = 0

    def __init__(self, checkpoint: Checkpoint, chunk_bytes: int = CHUNK_BYTES) -> None:
        if checkpoint.manifest is None:
            raise CheckpointError(f"{checkpoint.directory} is not a pack")
        self._manifest = checkpoint.manifest
        self.path = str(checkpoint.directory / EXPERTS_FILE)
        super().__init__(checkpoint, [self.path], chunk_bytes)

    def begin(self, key: ExpertKey, into: memoryview) -> ExpertRead:
        """Plan a read of ``key`` into ``into``. Reads nothing yet."""
        expert = self._manifest.find(key)
        chunks = split(self.path, expert.offset, expert.nbytes, 0, expert.nbytes, self._chunk_bytes)
        return _PackedRead(self._files, key, chunks, expert, into)

    def place(self, key: ExpertKey) -> Place:
        """Where ``key`` lies in the file ``path``. Raises IndexError for a key that the model does not have."""
        expert = self._manifest.find(key)
        return Place(expert.offset, expert.nbytes, expert.checksum)

    def where(self, key: ExpertKey, at: int) -> str:
        """File, offset and expert of the byte ``at`` of ``key``."""
        return f"{self.path} at byte {self._manifest.find(key).offset + at}, {name_of(key)}"

    def refuse_direct(self) -> None:
        """The file system has refused a direct read to somebody else: read through the page cache from now on."""
        self._files.fall_back(self.path)


class _PackedRead(_Read):
    def __init__(
        self, files: WeightFiles, key: ExpertKey, chunks: Sequence[Chunk], expert: PackedExpert, into: memoryview
    ) -> None:
        super().__init__(files, key, chunks, expert.nbytes)
        self._expert = expert
        self._into = into

    def _memory(self) -> memoryview:
        return self._into

    def finish(self) -> None:
        """Verify the bytes, which lie where they belong already. Raises ExpertReadError."""
        # hashing releases the interpreter lock: about 25 GB/s, beside reads of a few
        if xxhash.xxh3_128(self._into[: self._expert.nbytes]).hexdigest() != self._expert.checksum:
            raise ExpertReadError(f"{self.where(0)}: checksum mismatch")
