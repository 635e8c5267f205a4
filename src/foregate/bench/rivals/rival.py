"""What the benchmark needs of a rival. A module that has these functions is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

Progress = Callable[[int, int], None]
"""Told (done, total), in bytes."""


class Rival(Protocol):
    """One other system, run as a program of its own.

    The program's last line of stdout is one JSON object (``outcome.Outcome``).
    """

    FORMAT: str
    """What its weights are, for the table: such as ``Q8_0, 8.5 bits a weight``."""

    def available(self) -> str | None:
        """None if it can run here, else one line that says why not."""

    def prepare(self, model_dir: Path, work_dir: Path, progress: Progress) -> Path:
        """What it runs from, made in ``work_dir`` unless it lies there already. Raises ForegateError."""

    def command(self, prepared: Path, tokens_file: Path, threads: int) -> Sequence[str]:
        """The program, to be started cold and under whatever memory limit the caller sets."""

    def files(self, prepared: Path) -> Sequence[Path]:
        """The weight files that it reads: what must leave the page cache before a cold run."""
