"""Writes the files of a pack into a directory, from wherever an earlier run stopped. ``pack`` does the renaming."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import transformers
import xxhash

from foregate import __version__
from foregate.checkpoint import journal as journals
from foregate.checkpoint import manifest as manifests
from foregate.checkpoint.dense_int8 import candidates
from foregate.checkpoint.journal import Journal
from foregate.checkpoint.manifest import Manifest, PackedExpert, PackedLayer
from foregate.checkpoint.opening import Checkpoint
from foregate.checkpoint.packdense import dense_tensors
from foregate.checkpoint.packorder import Orders
from foregate.checkpoint.packplan import plan_dense, plan_experts
from foregate.checkpoint.packslot import make_slot
from foregate.checkpoint.precision import Precision
from foregate.checkpoint.source_reader import SourceReader
from foregate.types import ExpertKey, ExpertLayout

SYNC_BYTES = 64 << 20
"""Bytes between two syncs: what a kill can cost."""

COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
COPIED_NAMES = ("LICENSE", "NOTICE")


class PackWriter:
    """One run of packing ``checkpoint`` into ``directory``, quantising as ``precision`` says."""

    def __init__(self, checkpoint: Checkpoint, directory: Path, precision: Precision, orders: Orders) -> None:
        assert checkpoint.sources is not None
        self._checkpoint = checkpoint
        self._sources = checkpoint.sources
        self._directory = directory
        self._precision = precision
        self._modules = checkpoint.skeleton.moe
        self._layouts = [
            precision.layouts(m, plain) for m, plain in zip(self._modules, checkpoint.layouts, strict=True)
        ]
        layers = checkpoint.sources.layers
        self._experts = plan_experts([x.path for x in layers], orders, self._layout_of)
        self._orders = tuple(() if order == tuple(range(len(order))) else order for order in orders)
        int8 = candidates(checkpoint.skeleton) if precision.dense.bits else ()
        self._dense = plan_dense(dense_tensors(checkpoint.dense.values(), int8))
        self._partial = directory / f"{manifests.EXPERTS_FILE}.partial"
        self._journal = Journal(directory, self._plan_hash())
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise
        self.resumed = len(self._journal.checksums)
        """Experts that an earlier run wrote."""

    @property
    def remaining_bytes(self) -> int:
        """Disk space still needed."""
        there = sum(path.stat().st_blocks * 512 for path in self._directory.iterdir())
        return max(0, self._experts.nbytes + self._dense.nbytes - there)

    def run(self, progress: Callable[[int, int], None]) -> None:
        """Write everything that is missing; the manifest comes last. Raises OSError where writing fails."""
        total = self._experts.nbytes + self._dense.nbytes
        with SourceReader() as reader:
            checksum = self._write_dense(reader, lambda done: progress(done, total))
            self._write_experts(reader, lambda done: progress(self._dense.nbytes + done, total))
        self._copy_small_files()
        _write(self._directory / manifests.NAME, self._manifest(checksum).to_json().encode())
        _sync(self._directory)

    def close(self) -> None:
        self._journal.close()

    def _layout_of(self, key: ExpertKey) -> ExpertLayout:
        return self._layouts[key.layer][key in self._precision.kept_experts]

    def _plan_hash(self) -> str:
        """Changes with anything that would change the bytes, the source files' contents as far as their times tell."""
        digest = xxhash.xxh3_128(self._experts.header)
        digest.update(self._dense.header)
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self._checkpoint.shards.files]
        digest.update(json.dumps([self._checkpoint.fingerprint, stats, *_versions()]).encode())
        return str(digest.hexdigest())

    def _prepare(self) -> None:
        if not self._resumable():
            self._journal.restart()
            self._sweep()

    def _resumable(self) -> bool:
        """Whether the experts that the journal knows are there."""
        done = len(self._journal.checksums)
        if not done or (self._directory / manifests.EXPERTS_FILE).exists():
            return self._journal.resumes
        last = self._experts.experts[done - 1]
        return self._partial.exists() and self._partial.stat().st_size >= last.offset + last.nbytes

    def _sweep(self) -> None:
        """Remove what a pack of something else left."""
        for path in self._directory.iterdir():
            if path.name != journals.NAME:
                path.unlink() if path.is_file() else shutil.rmtree(path)

    def _write_dense(self, reader: SourceReader, report: Callable[[int], None]) -> str:
        """Small beside the experts, so an interrupted run writes it again. Returns its checksum."""
        digest = xxhash.xxh3_128(self._dense.header)
        with (self._directory / manifests.DENSE_FILE).open("wb") as file:
            file.write(self._dense.header)
            for tensor in self._dense.tensors:
                for piece in tensor.pieces(reader):
                    file.write(piece)
                    digest.update(piece)
                    report(file.tell())
            _flush(file.fileno(), file.flush)
        return str(digest.hexdigest())

    def _write_experts(self, reader: SourceReader, report: Callable[[int], None]) -> None:
        done = self._directory / manifests.EXPERTS_FILE
        if done.exists():
            return
        fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _write_all(fd, self._experts.header, 0)
            waiting: list[str] = []
            unsynced = 0
            for planned in self._experts.experts[self.resumed :]:
                slot = self._assemble(reader, planned.key)
                _write_all(fd, slot, planned.offset)
                waiting.append(xxhash.xxh3_128(slot).hexdigest())
                unsynced += planned.nbytes
                if unsynced >= SYNC_BYTES:
                    self._commit(fd, waiting)
                    waiting, unsynced = [], 0
                report(planned.offset + planned.nbytes)
            os.ftruncate(fd, self._experts.nbytes)
            self._commit(fd, waiting)
        finally:
            os.close(fd)
        self._partial.rename(done)

    def _commit(self, fd: int, checksums: list[str]) -> None:
        _flush(fd)
        self._journal.add(checksums)

    def _assemble(self, reader: SourceReader, key: ExpertKey) -> bytearray:
        layer = self._sources.layers[key.layer]
        segments = layer.segments(key.expert)
        return make_slot(layer, segments, reader.parts(segments), self._modules[key.layer], self._precision, key)

    def _copy_small_files(self) -> None:
        for path in sorted(self._checkpoint.directory.iterdir()):
            if path.is_file() and _is_small_file(path.name):
                content = path.read_bytes()
                if path.name == "config.json":
                    content = _config(content)
                _write(self._directory / path.name, content)

    def _manifest(self, dense_checksum: str) -> Manifest:
        checksums = iter(self._journal.checksums)
        packed = {
            e.key: PackedExpert(e.offset, e.nbytes, c) for e, c in zip(self._experts.experts, checksums, strict=True)
        }
        layers = []
        for number, layer in enumerate(self._sources.layers):
            kept = tuple(e for e in range(layer.experts) if ExpertKey(number, e) in self._precision.kept_experts)
            ordinary, finer = self._layouts[number]
            experts = tuple(packed[ExpertKey(number, expert)] for expert in range(layer.experts))
            layers.append(PackedLayer(layer.path, ordinary, experts, finer, kept, self._orders[number]))
        own, others = _versions()
        return Manifest(
            fingerprint=self._checkpoint.fingerprint,
            dtype=self._checkpoint.spec.dtype,
            experts_nbytes=self._experts.nbytes,
            dense_nbytes=self._dense.nbytes,
            dense_checksum=dense_checksum,
            layers=tuple(layers),
            foregate_version=own,
            transformers_version=others,
            precision=self._precision,
        )


def _versions() -> tuple[str, str]:
    return __version__, str(transformers.__version__)


def _is_small_file(name: str) -> bool:
    weights = name.endswith((".index.json", manifests.NAME))
    return not weights and (name.endswith(COPIED) or name in COPIED_NAMES)


def _config(content: bytes) -> bytes:
    """config.json without ``transformers_weights``, which names a file of the original."""
    config = json.loads(content)
    if "transformers_weights" not in config:
        return content
    del config["transformers_weights"]
    return (json.dumps(config, indent=2) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        _flush(file.fileno(), file.flush)


def _write_all(fd: int, content: bytes | bytearray, offset: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def _flush(fd: int, first: Callable[[], None] = lambda: None) -> None:
    """Onto the disk, and out of the page cache."""
    first()
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
