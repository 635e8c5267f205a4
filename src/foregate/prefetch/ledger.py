"""What speculation has done, layer by layer: the account that ``--explain-prefetch`` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Account:
    """Of one target layer. Counts of speculative reads; ``declined``: predicted and absent, but not worth reading."""

    issued: int = 0
    used: int = 0
    late: int = 0
    unused: int = 0
    declined: int = 0
    window_s: float = 0.0
    """Seconds from the prediction to the routing, waits for reads left out, on average."""
    precision: float | None = None
    """Share of the reads issued that were used, the last ones counting most."""


class Ledger:
    """Accounts of all layers, and the decisions with the step at which each was taken."""

    MOST_DECISIONS = 64

    def __init__(self, layers: int) -> None:
        self.accounts = [Account() for _ in range(layers)]
        self.decisions: list[tuple[int, bool, str]] = []
        self.unlisted = 0

    def decided(self, step: int, enabled: bool, reason: str) -> None:
        """Speculation was switched at decode step ``step``."""
        if len(self.decisions) < self.MOST_DECISIONS:
            self.decisions.append((step, enabled, reason))
        else:
            self.unlisted += 1

    def as_dict(self) -> dict[str, Any]:
        """JSON form: ``layers`` (one object a MoE layer) and ``decisions`` (step, enabled, reason)."""
        return {
            "layers": [asdict(account) for account in self.accounts],
            "decisions": [{"step": s, "enabled": e, "reason": r} for s, e, r in self.decisions],
            "decisions_unlisted": self.unlisted,
        }
