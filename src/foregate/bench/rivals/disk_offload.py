"""transformers with accelerate's disk offload: whole layers in bf16, resident while they fit, else mapped."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from foregate.bench.rivals.environment import RIVALS, last_line
from foregate.bench.rivals.rival import Progress
from foregate.errors import ForegateError

FORMAT = "bf16, 16 bits a weight"
INDEX = "foregate-offload.json"


def available() -> str | None:
    return RIVALS.missing("accelerate", "transformers")


def prepare(model_dir: Path, work_dir: Path, progress: Progress) -> Path:
    """``model_dir`` as transformers holds it, every parameter offloaded to ``work_dir``. Raises ForegateError."""
    out = work_dir / f"{model_dir.resolve().name}-offload"
    progress(0, 1)
    done = subprocess.run(
        RIVALS.program("disk_offload_prepare", str(model_dir), str(out)), capture_output=True, text=True
    )
    if done.returncode:
        raise ForegateError(f"accelerate's disk offload of {model_dir} failed: {last_line(done)}")
    progress(1, 1)
    return out


def command(prepared: Path, tokens_file: Path, threads: int) -> Sequence[str]:
    """The program; it takes the limit of the memory group in which it finds itself as the memory it may use."""
    return RIVALS.program("disk_offload_run", str(prepared), str(tokens_file), "--threads", str(threads))


def files(prepared: Path) -> Sequence[Path]:
    index = json.loads((prepared / INDEX).read_bytes())["index"]
    return sorted({Path(entry["safetensors_file"]) for entry in index.values()})
