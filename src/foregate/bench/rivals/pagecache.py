"""The page cache of files: emptied before a cold run, filled before a warm one, and counted."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_BLOCK = 1 << 24


def drop(paths: Iterable[Path]) -> None:
    """Write back and forget every page of ``paths``. Pages that a process has mapped stay: see ``cached_bytes``."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill(paths: Iterable[Path]) -> None:
    """Read ``paths`` into the page cache, charged to this process's memory group."""
    buffer = bytearray(_BLOCK)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cached_bytes(path: Path) -> int:
    """Bytes of ``path`` in the page cache now, by mincore(2). Raises OSError."""
    size = path.stat().st_size
    if not size:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as view:
        first = ctypes.c_char.from_buffer(view)
        code = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages)
        # the mapping cannot be closed while something points into it
        del first
    if code:
        raise OSError(ctypes.get_errno(), f"mincore of {path} failed")
    return sum(page & 1 for page in pages) * mmap.PAGESIZE
