"""What one part of an analysis has found: numbers, tables, charts, and what could not be computed and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from foregate.analysis.chart import Chart
from foregate.analysis.prompt import Prompt
from foregate.analysis.table import Table


@dataclass(slots=True)
class Section:
    """``arm`` says what every number of the section is over; ``method`` how it is defined, with its source."""

    name: str
    title: str
    arm: str
    method: str
    summary: dict[str, Any] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Collector(Protocol):
    """Sees every prompt once, in order, and holds a bounded amount of memory."""

    def add(self, prompt: Prompt) -> None: ...

    def finish(self) -> Section:
        """What was found. Called once, after the last prompt."""
        ...
