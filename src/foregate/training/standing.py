"""Where a training stands, for whoever looks on from another process: a small file in its directory of checkpoints."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

FILE = "standing.json"
WRITE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Standing:
    """``done`` of ``total`` units of ``stage`` (total None: nobody knows); the newest points of the loss curve."""

    stage: str = "reading traces"
    done: int = 0
    total: int | None = None
    epoch: int | None = None
    loss: float | None = None
    recall_at_k: float | None = None


class Teller:
    """Keeps the file in ``state`` up to date, twice a second at most. A full disk silences it: it is no checkpoint."""

    def __init__(self, state: Path) -> None:
        self._path = state / FILE
        self._at = Standing()
        self._written = 0.0

    def begin(self, stage: str, total: int | None) -> None:
        """Another stage."""
        self._at = replace(self._at, stage=stage, done=0, total=total)
        self._write()

    def advance(self, units: int) -> None:
        """``units`` more are done."""
        self._at = replace(self._at, done=self._at.done + units)
        if monotonic() - self._written > WRITE_SECONDS:
            self._write()

    def log(self, record: Mapping[str, Any]) -> None:
        """A point of the loss curve."""
        judged = record.get("validation", {})
        recall = judged.get("recall_at_k", self._at.recall_at_k)
        self._at = replace(
            self._at, epoch=record.get("epoch"), loss=record.get("loss", self._at.loss), recall_at_k=recall
        )
        if judged:
            self._write()

    def _write(self) -> None:
        self._written = monotonic()
        beside = self._path.with_suffix(".tmp")
        with contextlib.suppress(OSError):
            beside.write_text(json.dumps(asdict(self._at)))
            beside.replace(self._path)


def read(state: Path) -> Standing | None:
    """Where the training in ``state`` stands; None where it says nothing (yet, or any more)."""
    try:
        return Standing(**json.loads((state / FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None
