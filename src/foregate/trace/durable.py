"""Files that are there whole or not at all, whenever the process is killed or the power goes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foregate.errors import TraceError

TEMPORARY = ".tmp"
"""Suffix of files that do not count yet; whoever opens a trace for writing may delete them."""


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, flush it to the disk, rename it over ``path``, flush the directory.

    Raises TraceError, naming ``path``, where the disk is full or the like.
    """
    with named(path):
        temporary = path.with_name(path.name + TEMPORARY)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_all(handle, content)
            os.fsync(handle)
        finally:
            os.close(handle)
        temporary.replace(path)
        sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Create ``path`` (and its parents) so that it survives a crash. No error if it is there; else TraceError."""
    if not path.is_dir():
        with named(path):
            path.mkdir(parents=True, exist_ok=True)
            sync_directory(path.parent)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Inside, an OSError of the file system becomes a TraceError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise TraceError(f"{path}: cannot be written ({error.strerror})") from error


def write_all(handle: int, content: bytes) -> None:
    """``os.write`` until everything is written."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(handle, rest) :]


def sync_directory(path: Path) -> None:
    """Make names created in, renamed in or removed from ``path`` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
