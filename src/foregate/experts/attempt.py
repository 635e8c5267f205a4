"""One try at one part of a read: repeated chunk reads, and errors that name file, offset and expert. No threads."""

from __future__ import annotations

import time

from foregate.errors import ExpertReadError, ForegateError, TransferError
from foregate.interfaces import ExpertRead, ExpertStore
from foregate.types import ExpertKey

BACKOFF_S = 0.001
"""Seconds before the first retry; doubled for each further one."""


def chunk_bytes(read: ExpertRead, index: int) -> int:
    """Bytes of chunk ``index``, taking chunks as equal; over all chunks they add up to ``disk_bytes`` exactly."""
    return read.disk_bytes * (index + 1) // read.chunks - read.disk_bytes * index // read.chunks


def begin(store: ExpertStore, key: ExpertKey, into: memoryview) -> ExpertRead | TransferError:
    """Plan the read of ``key``: the plan, or the error to raise at the wait."""
    place = f"expert {key.layer}.{key.expert}"
    try:
        read = store.begin(key, into)
    except Exception as error:
        return _explained(error, place)
    # nobody would ever take its last chunk
    return read if read.chunks > 0 else TransferError(f"{place}: the store plans a read of {read.chunks} chunks")


def read_chunk(read: ExpertRead, index: int, retries: int) -> tuple[int, TransferError | None]:
    """Read one chunk, repeating it up to ``retries`` times after an OSError: (repeats it took, error or None)."""
    tried = 0
    while True:
        try:
            read.read(index)
        except OSError as error:
            if tried == retries:
                return tried, _explained(error, read.where(index))
            time.sleep(BACKOFF_S * 2**tried)
            tried += 1
        except Exception as error:
            return tried, _explained(error, read.where(index))
        else:
            return tried, None


def finish(read: ExpertRead) -> TransferError | None:
    """Bring the bytes into slot layout and verify them: the error, or None."""
    try:
        read.finish()
    except Exception as error:
        return _explained(error, read.where(0))
    return None


def _explained(error: Exception, place: str) -> TransferError:
    """The error to raise at the wait. What no store should raise is a bug: its type is named."""
    if isinstance(error, TransferError):
        return error
    if isinstance(error, (OSError, ForegateError)):
        result: TransferError = ExpertReadError(f"{place}: {error}")
    else:
        result = TransferError(f"{place}: unexpected {type(error).__name__}: {error}")
    result.__cause__ = error
    return result
