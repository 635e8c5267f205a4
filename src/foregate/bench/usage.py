"""What a confined process really uses of its memory limit: what it has allocated, and page cache beside that."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from foregate.testing.cgroup import Box

EVERY_S = 0.05
"""Between two looks; one takes the kernel well below a millisecond."""


@dataclass(slots=True)
class Usage:
    """Most bytes seen at a time. ``allocated``: what the kernel cannot give up (anonymous); ``cached``: page cache."""

    allocated: int = 0
    cached: int = 0
    looks: int = 0

    def see(self, now: tuple[int, int] | None) -> None:
        if now is not None:
            self.allocated, self.cached = max(self.allocated, now[0]), max(self.cached, now[1])
            self.looks += 1

    def add(self, other: Usage) -> None:
        """The most of both."""
        self.see((other.allocated, other.cached) if other.looks else None)

    def as_dict(self) -> dict[str, int] | None:
        """None where the kernel told nothing (systemd-run)."""
        return {"allocated_bytes": self.allocated, "page_cache_bytes": self.cached} if self.looks else None


@contextmanager
def gauged(box: Box, every_s: float = EVERY_S) -> Iterator[Usage]:
    """Looks at ``box`` again and again until the block ends."""
    usage, over = Usage(), threading.Event()

    def look() -> None:
        while not over.wait(every_s):
            usage.see(box.used())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield usage
    finally:
        over.set()
        thread.join()
