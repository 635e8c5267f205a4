"""The environments of their own in which rivals run, such as .venv-rivals: which Python it is, and what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import foregate

SOURCES = Path(foregate.__file__).parents[1]
_PROBE_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Environment:
    """A ``folder`` beside the sources, made by ``target`` of the Makefile; ``variable`` names another Python."""

    folder: str
    variable: str
    target: str

    def python(self) -> str:
        """The variable's Python, else the folder's if there is one, else this one."""
        usual = SOURCES.parent / self.folder / "bin" / "python"
        return os.environ.get(self.variable) or (str(usual) if usual.is_file() else sys.executable)

    def program(self, module: str, *arguments: str) -> list[str]:
        """The command that runs ``module`` of this package there, with its variables set by env(1)."""
        there = variables()
        pairs = [f"{name}={there[name]}" for name in ("PYTHONPATH", "HF_HUB_OFFLINE")]
        return ["env", *pairs, self.python(), "-m", f"foregate.bench.rivals.{module}", *arguments]

    def missing(self, *modules: str) -> str | None:
        """None if that Python imports ``modules``; else one line that says why not."""
        said = _missing(self.python(), modules)
        where = f"{self.python()} (make {self.target} installs it; {self.variable} names another Python)"
        return said and f"{said} in {where}"


RIVALS = Environment(".venv-rivals", "FOREGATE_RIVALS_PYTHON", "rivals")
AIRLLM = Environment(".venv-airllm", "FOREGATE_AIRLLM_PYTHON", "airllm")
"""airllm 4.0 does not run with transformers 5."""


def variables() -> dict[str, str]:
    """Environment variables for a program of a rival: it imports the Foregate that runs now."""
    path = os.pathsep.join([str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


@cache
def _missing(python: str, modules: tuple[str, ...]) -> str | None:
    command = [python, "-c", f"import {', '.join(modules)}"]
    try:
        done = subprocess.run(command, env=variables(), capture_output=True, text=True, timeout=_PROBE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else last_line(done)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a failed program said last."""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
