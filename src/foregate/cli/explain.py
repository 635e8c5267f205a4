"""The prefetch ledger as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table


def explain(ledger: dict[str, Any], reason: str) -> Iterator[str | Table]:
    """Decisions in order, then a table of layers."""
    for decision in ledger["decisions"]:
        state = "on" if decision["enabled"] else "off"
        yield f"step {decision['step']:>4}: speculation {state}: {decision['reason']}"
    if ledger["decisions_unlisted"]:
        yield f"and {ledger['decisions_unlisted']} more switches"
    yield f"at the end: {reason}"
    yield _layers(ledger["layers"])


def _layers(accounts: list[dict[str, Any]]) -> Table:
    table = Table(title="read ahead, by layer", title_justify="left")
    for name in ("layer", "issued", "used", "late", "unused", "declined", "precision", "window ms"):
        table.add_column(name, justify="right")
    for layer, account in enumerate(accounts):
        precision = "-" if account["precision"] is None else f"{account['precision']:.0%}"
        counts = [str(account[name]) for name in ("issued", "used", "late", "unused", "declined")]
        table.add_row(str(layer), *counts, precision, f"{account['window_s'] * 1e3:.2f}")
    return table
