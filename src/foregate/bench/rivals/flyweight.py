"""flyweight-llm, which runs GGUF files, Qwen among them: whether it takes a Qwen3-MoE is tried out, not believed.

It does not (0.23.1), so there is no program that feeds it tokens; should it ever, ``available`` says that instead.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NoReturn

from foregate.bench.rivals.environment import RIVALS, last_line, variables
from foregate.bench.rivals.rival import Progress
from foregate.checkpoint.locate import locate
from foregate.errors import ForegateError

FORMAT = "Q8_0, 8.5 bits a weight"
_SECONDS = 120


@cache
def available() -> str | None:
    """Why not, in flyweight's own words about the reference model as a GGUF file."""
    lacking = RIVALS.missing("flyweight")
    if lacking is not None:
        return lacking
    from foregate.bench.rivals.gguf_export import export

    with tempfile.TemporaryDirectory() as work:
        return _tried(export(locate("reference"), Path(work) / "reference.gguf"))


def _tried(file: Path) -> str:
    command = [RIVALS.python(), "-m", "flyweight", "generate", str(file), "--prompt", "Question:", "--max-tokens", "1"]
    try:
        done = subprocess.run(command, env=variables(), capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"flyweight-llm does not answer: {error}"
    if done.returncode == 0:
        return "flyweight-llm takes a Qwen3-MoE now, and Foregate has no program yet that feeds it given tokens"
    return f"flyweight-llm does not load a Qwen3-MoE: {last_line(done).removeprefix('flyweight: ')}"


def prepare(model_dir: Path, work_dir: Path, progress: Progress) -> NoReturn:
    """Raises ForegateError with the reason."""
    raise ForegateError(str(available()))


def command(prepared: Path, tokens_file: Path, threads: int) -> NoReturn:
    """Raises ForegateError with the reason."""
    raise ForegateError(str(available()))


def files(prepared: Path) -> Sequence[Path]:
    return []
