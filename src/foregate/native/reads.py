"""The signatures of ``reads.c``, and what its numbers mean. Nothing here decides anything."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_double, c_int, c_int32, c_int64, c_uint64, c_void_p
from enum import IntEnum
from functools import cache

from foregate.native.library import load

Source = Callable[[int, int, int], int]
"""(offset in the file, address to write to, bytes) → bytes read or a negated errno, in place of ``pread``."""

SOURCE = ctypes.CFUNCTYPE(c_int64, c_int64, c_void_p, c_int64)


class Status(IntEnum):
    """Of one request. From COMPLETE on nothing writes to its slot any more."""

    RUNNING = 0
    STALLED = 1
    COMPLETE = 2
    FAILED = 3
    CANCELLED = 4


class Failure(IntEnum):
    """Why a request failed."""

    NONE = 0
    SYSTEM = 1
    TRUNCATED = 2
    CHECKSUM = 3
    TIMEOUT = 4


class ReadError(ctypes.Structure):
    """``number``: errno of SYSTEM. ``offset`` of the chunk in the file; ``size`` of the file for TRUNCATED."""

    _fields_ = (("failure", c_int32), ("number", c_int32), ("offset", c_int64), ("size", c_int64))


class Span(ctypes.Structure):
    """One read of a request: seconds on ``perf_counter``'s clock, bytes (0: it failed), number of the thread."""

    _fields_ = (("began", c_double), ("ended", c_double), ("nbytes", c_int64), ("reader", c_int64))


COUNTS = ("demand_bytes", "prefetch_bytes", "chunks", "retries", "rereads", "failed", "failed_prefetch", "cancelled")
TIMES = ("busy_s", "active_s")


class ReadCounts(ctypes.Structure):
    """The counters of ``experts.counters.TransferStats``."""

    _fields_ = (*((name, c_int64) for name in COUNTS), *((name, c_double) for name in TIMES))


CALLED = {"reads_submit": 8, "reads_promote": 2, "reads_cancel": 2, "reads_status": 2}
"""Functions that every expert needs, for ``library.function``, and how many arguments they have."""


@cache
def library() -> ctypes.CDLL | None:
    """``reads.c`` with its other signatures declared, or None where it is not to be had."""
    signatures = {
        "reads_open": (c_void_p, [c_int32, c_int32, POINTER(c_int32), c_int32, c_int, c_int, SOURCE]),
        "reads_threads": (c_int32, [c_void_p]),
        "reads_wait": (c_int32, [c_void_p, POINTER(c_int32), c_int32, c_double, c_double, c_double]),
        "reads_error": (None, [c_void_p, c_int32, POINTER(ReadError)]),
        "reads_stats": (c_int, [c_void_p, POINTER(ReadCounts)]),
        "reads_spans": (c_int32, [c_void_p, c_int32, POINTER(Span), c_int32]),
        "reads_digest": (c_int, [c_void_p, c_uint64, c_int, POINTER(c_uint64)]),
        "reads_close": (c_int32, [c_void_p, c_double]),
        "reads_free": (None, [c_void_p]),
    }
    found = load("reads", [*signatures, *CALLED])
    if found is None:
        return None
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found
