"""The small trace of the reference model that ships with the package, for tests, demos and first steps."""

from __future__ import annotations

from pathlib import Path

from foregate.errors import TraceError
from foregate.trace.reader import TraceReader

SAMPLE = Path(__file__).with_name("reference-sample")
NAME = "sample"
"""What the shipped trace is called on command lines, unless there is a file of that name."""


def locate(trace: Path) -> Path:
    """``trace`` itself, or the shipped one if it is named ``sample`` and nothing here is."""
    return SAMPLE if str(trace) == NAME and not trace.exists() else trace


def spoken(trace: Path) -> str:
    """How a report names ``trace``: the shipped one by its name, wherever the package is installed."""
    return NAME if trace == SAMPLE else str(trace)


def open_sample() -> TraceReader:
    """Open it. Raises TraceError where this installation has none."""
    if not SAMPLE.is_dir():
        raise TraceError(f"{SAMPLE} is not in this installation; foregate.trace.make_traces --sample makes it")
    return TraceReader(SAMPLE)
