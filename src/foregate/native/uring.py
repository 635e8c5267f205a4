"""``uring.c``: pieces of a file read by io_uring, for a measurement."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import c_double, c_int, c_int32, c_int64, c_void_p

from foregate.errors import ConfigError
from foregate.native.library import load


def read(
    file: int, offsets: Sequence[int], nbytes: int, chunk_bytes: int, depth: int, into: memoryview, *, registered: bool
) -> tuple[float, float]:
    """Read ``nbytes`` at each of ``offsets`` of the open ``file`` in chunks, ``depth`` of them at a time.

    ``into``: writable, its places of ``nbytes`` (64 at most) are filled one after another, again and again.
    ``registered``: buffers and file are told to the kernel once. A direct read needs all of it aligned. Returns
    seconds, and seconds of processor time. Raises OSError as the kernel says (ENOSYS, EPERM: no io_uring here; ENOMEM:
    too little may be locked; EIO: the file is too short), ConfigError where a number is impossible or the part was not
    compiled.
    """
    if min(chunk_bytes, depth, nbytes) < 1 or len(into) < nbytes:
        raise ConfigError(f"{depth} reads of {chunk_bytes} of {nbytes} bytes into {len(into)} bytes are impossible")
    found = load("uring", ["uring_read"])
    if found is None:
        raise ConfigError("io_uring cannot be measured: Foregate was installed without its compiled parts")
    call = found.uring_read
    call.argtypes = [c_int, c_void_p, c_int64, c_int64, c_int64, c_int32, c_void_p, c_int64, c_int32, c_void_p]
    memory, took = (ctypes.c_char * len(into)).from_buffer(into), (c_double * 2)()
    numbers, places = (c_int64 * len(offsets))(*offsets), len(into) // nbytes
    failed = -call(file, numbers, len(offsets), nbytes, chunk_bytes, depth, memory, places, registered, took)
    if failed:
        raise OSError(failed, os.strerror(failed))
    return took[0], took[1]
