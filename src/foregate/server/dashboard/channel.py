"""From the generating thread to one browser: a bounded queue that never makes the sender wait."""

from __future__ import annotations

import asyncio
from collections import deque

LIMIT = 256
"""Messages that wait for a slow browser. One more, and it gets a fresh snapshot instead of them all."""


class Channel:
    """``put`` from any thread, under the board's lock; the rest on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int = LIMIT) -> None:
        self.stale = True
        self.overflows = 0
        self._loop = loop
        self._limit = limit
        self._waiting: deque[str] = deque()
        self._filled = asyncio.Event()
        self._woken = False

    def put(self, message: str) -> None:
        """Queue ``message``. Once too many wait, drop them: the browser is ``stale``."""
        if not self.stale:
            if len(self._waiting) < self._limit:
                self._waiting.append(message)
            else:
                self._waiting.clear()
                self.stale = True
                self.overflows += 1
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._filled.set)

    def take(self) -> list[str]:
        """What waits, under the board's lock; the channel is fresh again."""
        taken = list(self._waiting)
        self._waiting.clear()
        self._filled.clear()
        self._woken = self.stale = False
        return taken

    async def wait(self, timeout_s: float) -> bool:
        """True when there is something to take, False after ``timeout_s``."""
        try:
            await asyncio.wait_for(self._filled.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True
