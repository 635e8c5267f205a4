"""How fast a directory's disk reads pieces of expert size, past the page cache."""

from __future__ import annotations

import mmap
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

from foregate.errors import ForegateError
from foregate.types import align_up

FILE_BYTES = 256 * 2**20
THREADS = (1, 2, 4, 8)


def measure(directory: Path, read_bytes: int) -> dict[str, Any]:
    """GB/s by number of simultaneous reads of ``read_bytes`` (rounded up to 4 KiB), on a temporary file of 256 MiB.

    Raises ForegateError when the directory cannot hold the file.
    """
    nbytes = min(align_up(read_bytes), FILE_BYTES)
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".foregate-doctor-") as file:
            _fill(file.fileno())
            handle, why = _open(file.name)
            try:
                speeds = {n: _speed(handle, nbytes, n) for n in THREADS}
            finally:
                os.close(handle)
    except OSError as error:
        raise ForegateError(f"cannot measure the disk of {directory}: {error}") from error
    return {"read_bytes": nbytes, "direct_io": not why, "why": why, "gb_per_s": speeds}


def _fill(handle: int) -> None:
    block = os.urandom(4 * 2**20)
    for _ in range(FILE_BYTES // len(block)):
        os.write(handle, block)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def _open(name: str) -> tuple[int, str]:
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECT), ""
    except OSError as error:
        return os.open(name, os.O_RDONLY), f"{error.strerror}"


def _speed(handle: int, nbytes: int, threads: int) -> float:
    """GB/s of reading the whole file once in pieces of ``nbytes`` with ``threads`` readers."""
    offsets = list(range(0, FILE_BYTES - nbytes + 1, nbytes))
    buffers = [mmap.mmap(-1, nbytes) for _ in range(threads)]

    def work(mine: int) -> int:
        total = 0
        for offset in offsets[mine::threads]:
            total += os.preadv(handle, [buffers[mine]], offset)
            os.posix_fadvise(handle, offset, nbytes, os.POSIX_FADV_DONTNEED)
        return total

    began = perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(work, range(threads)))
    seconds = perf_counter() - began
    for buffer in buffers:
        buffer.close()
    return total / seconds / 1e9
