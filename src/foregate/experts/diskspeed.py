"""How fast a disk delivers pieces of expert size past the page cache, and what that costs in processor time."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, cycle, product
from math import gcd
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

from foregate.checkpoint.reader import WeightFiles
from foregate.checkpoint.readplan import CHUNK_BYTES, Chunk, split
from foregate.errors import ForegateError
from foregate.experts.native_transfer import NativeTransfer, Place, available
from foregate.experts.slots import SlotPool
from foregate.experts.transfer import ThreadedTransfer
from foregate.interfaces import ExpertRead, Transfer
from foregate.types import ExpertKey, ExpertLayout, align_up

FILE_BYTES = 256 * 2**20
DEPTHS = (1, 2, 4, 8)
POOL_BYTES = 128 * 2**20
"""Memory that a measurement reads into."""

Reader = Literal["auto", "native", "python"]


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Reads of ``read_bytes`` each, in chunks of ``chunk_bytes``, ``depth`` chunks at the same time.

    ``cpu_ms_per_gb`` is processor time of this process, kernel included, for 10^9 bytes.
    """

    read_bytes: int
    chunk_bytes: int
    depth: int
    gb_per_s: float
    cpu_ms_per_gb: float


def disk_speed(
    file: Path,
    read_bytes: int,
    *,
    depths: Sequence[int] = DEPTHS,
    chunks: Sequence[int] = (CHUNK_BYTES,),
    point_bytes: int = FILE_BYTES,
    rounds: int = 1,
    reader: Reader = "auto",
) -> list[DiskSpeed]:
    """One figure for every depth and chunk size: the median of ``rounds``, which are interleaved.

    Reads pieces of ``file`` (at least ``read_bytes`` long, written to disk) in a scattered order, ``point_bytes`` for
    each figure. ``reader`` "native" is the compiled one, "python" the fallback. Raises ForegateError when the file
    cannot be read, ConfigError when the compiled reader is asked for and missing.
    """
    nbytes = align_up(read_bytes)
    store = _Pieces(file, nbytes)
    pool = measuring_pool(nbytes)
    try:
        found: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for _, point in product(range(rounds), product(chunks, depths)):
            with _transfer(store, pool, reader, *point) as transfer:
                found.setdefault(point, []).append(_run(transfer, store.keys(), pool.slots, point_bytes, nbytes))
    except OSError as error:
        raise ForegateError(f"cannot measure {file}: {error}") from error
    finally:
        store.close()
    return [
        DiskSpeed(nbytes, chunk, depth, median(x[0] for x in runs), median(x[1] for x in runs))
        for (chunk, depth), runs in found.items()
    ]


def measuring_pool(nbytes: int) -> SlotPool:
    """Slots to read pieces of ``nbytes`` into, all committed: the first touch of a page is not the disk's time."""
    pool = SlotPool(max(2, min(16, POOL_BYTES // nbytes)), nbytes)
    pool.commit()
    return pool


def measure(directory: Path, read_bytes: int) -> dict[str, Any]:
    """GB/s by number of simultaneous reads for experts of ``read_bytes``, on a temporary file of 256 MiB.

    Raises ForegateError when the directory cannot hold the file.
    """
    nbytes = min(align_up(read_bytes), FILE_BYTES)
    with scratch_file(directory) as file:
        speeds = {found.depth: found.gb_per_s for found in disk_speed(file, nbytes)}
        why = _refusal(file)
    return {"read_bytes": nbytes, "direct_io": not why, "why": why, "gb_per_s": speeds}


@contextmanager
def scratch_file(directory: Path, nbytes: int = FILE_BYTES) -> Iterator[Path]:
    """A temporary file of random bytes in ``directory``, on disk and not in the page cache. Raises ForegateError."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".foregate-doctor-") as file:
            block = os.urandom(4 * 2**20)
            for done in range(0, nbytes, len(block)):
                file.write(block[: nbytes - done])
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            yield Path(file.name)
    except OSError as error:
        raise ForegateError(f"cannot measure the disk of {directory}: {error}") from error


def drive(transfer: Transfer, keys: Iterator[ExpertKey], slots: int, experts: int, seconds: float = 3600.0) -> int:
    """Read ``experts`` of ``keys``, one after another into ``slots`` slots that are all kept busy; end early after
    ``seconds``. Returns how many were read. Raises TransferError."""
    begun = min(slots, experts)
    flight = [transfer.submit(next(keys), slot, speculative=False) for slot in range(begun)]
    end, done = perf_counter() + seconds, 0
    while flight:
        ticket = transfer.wait_any(flight)
        transfer.wait(ticket)
        flight.remove(ticket)
        done += 1
        if begun < experts and perf_counter() < end:
            flight.append(transfer.submit(next(keys), ticket.slot, speculative=False))
            begun += 1
    return done


def scattered(total: int) -> Iterator[int]:
    """0 to ``total - 1``, again and again, neighbours far apart."""
    step = next(n for n in count(max(1, total * 5 // 13)) if gcd(n, total) == 1)
    return (number * step % total for number in cycle(range(total)))


def _run(
    transfer: Transfer, keys: Iterator[ExpertKey], slots: int, nbytes: int, expert_bytes: int
) -> tuple[float, float]:
    """(GB/s, processor milliseconds per GB) of reading about ``nbytes``."""
    began, cpu = perf_counter(), _cpu_s()
    gigabytes = drive(transfer, keys, slots, max(1, nbytes // expert_bytes)) * expert_bytes / 1e9
    return gigabytes / (perf_counter() - began), (_cpu_s() - cpu) * 1e3 / gigabytes


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _transfer(
    store: _Pieces, pool: SlotPool, reader: Reader, chunk_bytes: int, depth: int
) -> NativeTransfer | ThreadedTransfer:
    if reader == "native" or (reader == "auto" and available()):
        return NativeTransfer(store, pool, threads=depth, chunk_bytes=chunk_bytes)
    store.chunk_bytes = chunk_bytes
    return ThreadedTransfer(store, pool, threads=depth)


def _refusal(file: Path) -> str:
    """Why ``file`` cannot be read past the page cache, or nothing."""
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        return f"{error.strerror}"
    return ""


class _Pieces:
    """A file as a store of equal pieces, for both readers. Nothing is verified."""

    def __init__(self, file: Path, nbytes: int) -> None:
        self.path = str(file)
        self.slot_bytes = nbytes
        self.chunk_bytes = CHUNK_BYTES
        try:
            self._files = WeightFiles([self.path])
            self._count = self._files.size(self.path) // nbytes
        except OSError as error:
            raise ForegateError(f"cannot measure {file}: {error}") from error
        if not self._count:
            raise ForegateError(f"{file} is too short to measure reads of {nbytes} bytes")

    @property
    def direct_io(self) -> bool:
        return self._files.direct_io

    def keys(self) -> Iterator[ExpertKey]:
        """Every piece, again and again, neighbours far apart."""
        return (ExpertKey(0, number) for number in scattered(self._count))

    def place(self, key: ExpertKey) -> Place:
        return Place(key.expert * self.slot_bytes, self.slot_bytes, None)

    def where(self, key: ExpertKey, at: int) -> str:
        return f"{self.path} at byte {key.expert * self.slot_bytes + at}"

    def refuse_direct(self) -> None:
        self._files.fall_back(self.path)

    def layout(self, layer: int) -> ExpertLayout:
        return ExpertLayout((), self.slot_bytes)

    def begin(self, key: ExpertKey, into: memoryview) -> ExpertRead:
        size = self.slot_bytes
        return _Piece(self._files, into, split(self.path, key.expert * size, size, 0, size, self.chunk_bytes))

    def close(self) -> None:
        self._files.close()


class _Piece:
    """The reading of one piece in Python."""

    def __init__(self, files: WeightFiles, into: memoryview, chunks: Sequence[Chunk]) -> None:
        self.chunks = len(chunks)
        self.disk_bytes = len(into)
        self._files = files
        self._into = into
        self._chunks = chunks

    def read(self, index: int) -> None:
        chunk = self._chunks[index]
        self._files.read(chunk.path, chunk.offset, self._into[chunk.at : chunk.at + chunk.nbytes])

    def finish(self) -> None:
        pass

    def where(self, index: int) -> str:
        chunk = self._chunks[index]
        return f"{chunk.path} at byte {chunk.offset}"
