"""How a prompt is cut into forward passes: by its length and a constant, never by budget or residency. No torch."""

from __future__ import annotations

REST = 8
"""Tokens that are not worth a pass of their own: they join the chunk before."""

READ_WHOLE = frozenset({"jamba"})
"""Families whose layers, in transformers, drop their state between passes of many tokens: one pass, however long."""


def chunk_bounds(tokens: int, size: int) -> list[tuple[int, int]]:
    """First and end token of each pass: ``size`` tokens, the last of 9 to ``size`` + ``REST``."""
    starts = list(range(0, tokens, size))
    if len(starts) > 1 and tokens - starts[-1] <= REST:
        starts.pop()
    return list(zip(starts, [*starts[1:], tokens], strict=True))
