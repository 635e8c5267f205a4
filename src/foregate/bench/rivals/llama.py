"""llama.cpp on a memory-mapped GGUF file of Q8_0, through llama-cpp-python. Experts come in by page faults."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from foregate.bench.rivals.environment import RIVALS
from foregate.bench.rivals.rival import Progress

FORMAT = "Q8_0, 8.5 bits a weight (8 and a scale in 16 bits for every 32 weights)"


def available() -> str | None:
    return RIVALS.missing("llama_cpp")


def prepare(model_dir: Path, work_dir: Path, progress: Progress) -> Path:
    """``model_dir`` as a Q8_0 GGUF file in ``work_dir``. Raises UnsupportedModelError for what it cannot express."""
    from foregate.bench.rivals.gguf_export import export

    return export(model_dir, work_dir / f"{model_dir.resolve().name}-q8_0.gguf", progress=progress)


def command(prepared: Path, tokens_file: Path, threads: int) -> Sequence[str]:
    return RIVALS.program("llama_run", str(prepared), str(tokens_file), "--threads", str(threads))


def files(prepared: Path) -> Sequence[Path]:
    return [prepared]
