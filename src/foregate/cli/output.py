"""What commands share for the terminal: consoles, sizes, and JSON on the last line of stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table


def console() -> Console:
    """For what accompanies a result (progress, statistics): stderr, so that stdout is the result alone."""
    return Console(stderr=True, highlight=False)


def result() -> Console:
    """For tables that are the result: stdout."""
    return Console(highlight=False)


def size(nbytes: float) -> str:
    """``nbytes`` with a decimal unit, three significant digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def two_columns(title: str, rows: list[tuple[str, str]]) -> Table:
    """A plain name/value table."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(name, value)
    return table
