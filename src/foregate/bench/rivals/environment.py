"""The environment of their own in which rivals run, .venv-rivals: which Python it is, and what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import foregate

VARIABLE = "FOREGATE_RIVALS_PYTHON"
"""Environment variable that names another Python."""

SOURCES = Path(foregate.__file__).parents[1]
_DEFAULT = SOURCES.parent / ".venv-rivals" / "bin" / "python"
_PROBE_SECONDS = 120


def python() -> str:
    """The Python that has the rivals: FOREGATE_RIVALS_PYTHON, else .venv-rivals of this checkout, else this one."""
    return os.environ.get(VARIABLE) or (str(_DEFAULT) if _DEFAULT.is_file() else sys.executable)


def environment() -> dict[str, str]:
    """Environment variables for a program of a rival: it imports the Foregate that runs now."""
    path = os.pathsep.join([str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def program(module: str, *arguments: str) -> list[str]:
    """The command that runs ``module`` of this package there, with its variables set by env(1)."""
    there = environment()
    pairs = [f"{name}={there[name]}" for name in ("PYTHONPATH", "HF_HUB_OFFLINE")]
    return ["env", *pairs, python(), "-m", f"foregate.bench.rivals.{module}", *arguments]


@cache
def missing(*modules: str) -> str | None:
    """None if that Python imports ``modules``; else one line that says why not."""
    try:
        done = subprocess.run(
            [python(), "-c", f"import {', '.join(modules)}"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python()}: {error}"
    if done.returncode == 0:
        return None
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"{said} in {python()} (make rivals installs it, or {VARIABLE} names a Python that has it)"
