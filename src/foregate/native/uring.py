"""``uring.c``: pieces of a file read by io_uring, for a measurement."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import c_int, c_int32, c_int64, c_void_p

from foregate.errors import ConfigError
from foregate.native.library import load


def read(
    file: int, offsets: Sequence[int], nbytes: int, chunk_bytes: int, depth: int, into: memoryview, *, registered: bool
) -> None:
    """Read ``nbytes`` at each of ``offsets`` of the open ``file`` in chunks, ``depth`` of them at a time.

    ``into``: writable, its places of ``nbytes`` are filled one after another, again and again. ``registered``: buffers
    and file are told to the kernel once. Raises OSError as the kernel says (ENOSYS, EPERM: no io_uring here),
    ConfigError where the part was not compiled.
    """
    found = load("uring", ["uring_read"])
    if found is None:
        raise ConfigError("io_uring cannot be measured: Foregate was installed without its compiled parts")
    call = found.uring_read
    call.argtypes = [c_int, c_void_p, c_int64, c_int64, c_int64, c_int32, c_void_p, c_int64, c_int32]
    memory = (ctypes.c_char * len(into)).from_buffer(into)
    numbers = (c_int64 * len(offsets))(*offsets)
    places = len(into) // nbytes
    failed = -call(file, numbers, len(offsets), nbytes, chunk_bytes, depth, memory, places, registered)
    if failed:
        raise OSError(failed, os.strerror(failed))
