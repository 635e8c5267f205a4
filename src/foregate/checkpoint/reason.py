"""Other libraries' errors, which may span a page, as part of one line of ours."""

from __future__ import annotations

LIMIT = 240
"""Characters kept."""


def reason(error: BaseException) -> str:
    """What ``error`` says, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LIMIT else f"{text[:LIMIT]}…"
