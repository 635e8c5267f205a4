"""Every kind of transfer by name, over any store, and waiting for what other threads do. For tests."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter, sleep

from foregate.experts.native_transfer import NativeTransfer
from foregate.experts.sync_transfer import SyncTransfer
from foregate.experts.transfer import ThreadedTransfer
from foregate.testing.native import native_over

AnyTransfer = ThreadedTransfer | NativeTransfer | SyncTransfer
Make = Callable[..., AnyTransfer]
"""``make(store, pool, **settings)``"""

IN_PYTHON: dict[str, Make] = {
    "1 thread": lambda store, pool, **k: ThreadedTransfer(store, pool, threads=1, **k),
    "4 threads": lambda store, pool, **k: ThreadedTransfer(store, pool, threads=4, **k),
    "sync": SyncTransfer,
    "lazy": lambda store, pool, **k: SyncTransfer(store, pool, lazy=True, **k),
}
IN_C: dict[str, Make] = {
    "1 native thread": lambda store, pool, **k: native_over(store, pool, threads=1, **k),
    "4 native threads": lambda store, pool, **k: native_over(store, pool, threads=4, **k),
}
EVERY_KIND = IN_PYTHON | IN_C

PATIENCE_S = 60.0
"""After which something that should happen soon counts as not happening, on a busy machine too."""


def until(condition: Callable[[], bool]) -> None:
    """Wait for ``condition``. Raises AssertionError where it does not come."""
    deadline = perf_counter() + PATIENCE_S
    while not condition():
        assert perf_counter() < deadline, "waited in vain"
        sleep(1e-3)
