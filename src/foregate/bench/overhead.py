"""How much memory our own process needs beside budget and dense weights: measured, and then shown to be enough.

The stated overhead is generous, and what a rival does not allocate of it is page cache for its weights. With the
measured one all run under the tightest limit that our engine survives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from foregate.errors import ForegateError, KilledError

STEP = 32 << 20
"""Bytes. Added to what was seen allocated (for code, page tables, what no look saw), and again after a kill."""

SPARE = 3 * STEP
"""Bytes beyond that: the trial is shorter than the arms, whose longest once died of the least that it survived."""

Trial = Callable[[int], Mapping[str, int] | None]
"""Runs our engine with so many bytes of overhead; what it used (``Usage.as_dict``), None where that cannot be told.

Raises KilledError."""


def measured_overhead(trial: Trial, *, stated: int, held: int) -> int:
    """The least overhead, in steps of ``STEP``, under which ``trial`` gets through, and ``SPARE``.

    ``held``: budget and dense bytes.

    At most ``stated``. Raises ForegateError where the kernel does not tell what is used.
    """
    used = trial(stated)
    if used is None:
        raise ForegateError("--overhead measured needs a cgroup that tells what is used: v1 or v2, not systemd-run")
    tried = max(STEP, _steps(used["allocated_bytes"] - held) + STEP)
    while tried < stated:
        try:
            trial(tried)
        except KilledError:
            tried += STEP
        else:
            return min(tried + SPARE, stated)
    return stated


def _steps(nbytes: int) -> int:
    return -(-nbytes // STEP) * STEP
