"""Reading weight files around the page cache: O_DIRECT where the file system allows it, else buffered and forgotten."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from mmap import mmap

from foregate.types import ALIGNMENT

REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)
"""What file systems answer that do not do O_DIRECT, at open or at the first read."""

logger = logging.getLogger("foregate")


@dataclass(slots=True)
class _Handle:
    fd: int
    direct: bool


class WeightFiles:
    """The weight files of a store, opened on first use. Every method may be called from any thread."""

    def __init__(self, paths: Iterable[str], *, direct: bool = True) -> None:
        self._handles: dict[str, _Handle] = {}
        self._lock = threading.Lock()
        self._retired: list[int] = []
        self.direct_io = direct
        for path in list(paths)[:1]:
            self._probe(path)

    def size(self, path: str) -> int:
        """Bytes of the file, now."""
        return os.fstat(self._handle(path).fd).st_size

    def read(self, path: str, offset: int, into: memoryview) -> int:
        """Fill ``into`` from byte ``offset``; the bytes read are fewer than its length only where the file ends.

        Offset, length and memory address must be multiples of 4096. Raises OSError.
        """
        done = 0
        while done < len(into):
            count, direct = self._read_once(path, offset + done, into[done:])
            if count == 0:
                break
            reached = done + count
            if direct and reached % ALIGNMENT:
                if offset + reached >= self.size(path):
                    return reached
                # a direct read can only be continued from an aligned place
                reached -= reached % ALIGNMENT
                if reached == done:
                    raise OSError(errno.EIO, "direct read stops short of one block", path)
            done = reached
        return done

    def close(self) -> None:
        """Close every file. No read may be under way."""
        with self._lock:
            for fd in [*self._retired, *(handle.fd for handle in self._handles.values())]:
                os.close(fd)
            self._handles.clear()
            self._retired.clear()

    def _read_once(self, path: str, offset: int, into: memoryview) -> tuple[int, bool]:
        handle = self._handle(path)
        if handle.direct:
            try:
                return os.preadv(handle.fd, [into], offset), True
            except OSError as error:
                if error.errno not in REFUSALS:
                    raise
            handle = self.fall_back(path)
        count = os.preadv(handle.fd, [into], offset)
        # the budget must not be exceeded in the page cache
        os.posix_fadvise(handle.fd, offset, count, os.POSIX_FADV_DONTNEED)
        return count, False

    def _handle(self, path: str) -> _Handle:
        handle = self._handles.get(path)
        if handle is None:
            with self._lock:
                handle = self._handles.get(path)
                if handle is None:
                    handle = self._handles[path] = self._open(path)
        return handle

    def _open(self, path: str) -> _Handle:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if self.direct_io:
            try:
                return _Handle(os.open(path, flags | os.O_DIRECT), True)
            except OSError as error:
                if error.errno not in REFUSALS:
                    raise
            self._say_buffered(path)
        return _Handle(os.open(path, flags), False)

    def fall_back(self, path: str) -> _Handle:
        """Read ``path`` through the page cache from now on."""
        with self._lock:
            handle = self._handles[path]
            if handle.direct:
                # not closed: another thread may be reading from it
                self._retired.append(handle.fd)
                self._say_buffered(path)
                handle = self._handles[path] = self._open(path)
            return handle

    def _say_buffered(self, path: str) -> None:
        if self.direct_io:
            self.direct_io = False
            logger.warning("%s: O_DIRECT refused; reading through the page cache, and dropping what was read", path)

    def _probe(self, path: str) -> None:
        """Find out now whether direct reads work, so that ``direct_io`` is right from the start."""
        self.read(path, 0, memoryview(mmap(-1, ALIGNMENT)))
