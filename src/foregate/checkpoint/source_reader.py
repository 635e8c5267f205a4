"""Exact reads from safetensors files, for packing and verifying: buffered, sequential, forgotten by the page cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from types import TracebackType

from foregate.errors import CheckpointError
from foregate.types import Segment

PIECE_BYTES = 16 << 20
"""Bytes of one read where a tensor is copied in pieces."""


class SourceReader:
    """Open weight files. A context manager; not for several threads.

    ``scattered``: small reads far apart, nothing is to be read ahead. ``keep``: somebody else reads the same bytes
    next, so they may stay in the page cache.
    """

    def __init__(self, *, scattered: bool = False, keep: bool = False) -> None:
        self._fds: dict[str, int] = {}
        self._scattered = scattered
        self._keep = keep

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def parts(self, segments: Sequence[Segment]) -> list[memoryview]:
        """The bytes of every segment. Raises CheckpointError naming the file."""
        return [self.read(segment.path, segment.offset, segment.nbytes) for segment in segments]

    def pieces(self, path: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """The same bytes, in pieces of a bounded size."""
        for begin in range(0, nbytes, PIECE_BYTES):
            yield self.read(path, offset + begin, min(PIECE_BYTES, nbytes - begin))

    def read(self, path: str, offset: int, nbytes: int) -> memoryview:
        """Exactly ``nbytes`` bytes, writable. Raises CheckpointError naming file and offset."""
        view = memoryview(bytearray(nbytes))
        done = 0
        try:
            fd = self._open(path)
            while done < nbytes:
                count = os.preadv(fd, [view[done:]], offset + done)
                if count == 0:
                    size = os.fstat(fd).st_size
                    raise CheckpointError(f"{path}: truncated: expected {offset + nbytes} bytes, found {size}")
                done += count
            if not self._keep:
                os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(f"{path} at byte {offset + done}: cannot be read: {error.strerror}") from error
        return view

    def _open(self, path: str) -> int:
        if path not in self._fds:
            self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if self._scattered:
                os.posix_fadvise(self._fds[path], 0, 0, os.POSIX_FADV_RANDOM)
        return self._fds[path]
