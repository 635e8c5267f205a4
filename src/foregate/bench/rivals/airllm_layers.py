"""airllm: the layers come from the disk one after the other for every token, whatever the routing. bf16."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from foregate.bench.rivals.environment import AIRLLM, last_line
from foregate.bench.rivals.rival import Progress
from foregate.checkpoint.shards import read_shards
from foregate.errors import ForegateError

FORMAT = "bf16, 16 bits a weight"
SPLIT = "split"
MARKER = "foregate-model.txt"


def available() -> str | None:
    return AIRLLM.missing("airllm")


def prepare(model_dir: Path, work_dir: Path, progress: Progress) -> Path:
    """``model_dir`` split into layers by airllm in ``work_dir``. Raises ForegateError."""
    out = work_dir / f"{model_dir.resolve().name}-airllm"
    if (out / MARKER).is_file():
        if (out / MARKER).read_text() != str(model_dir.resolve()):
            raise ForegateError(f"{out} holds another model; remove it or choose another directory")
        return out
    progress(0, 1)
    shutil.rmtree(out, ignore_errors=True)
    _older(model_dir.resolve(), out / "model")
    done = subprocess.run(AIRLLM.program("airllm_run", str(out), "--split"), capture_output=True, text=True)
    if done.returncode:
        raise ForegateError(f"airllm cannot split {model_dir}: {last_line(done)}")
    (out / MARKER).write_text(str(model_dir.resolve()))
    progress(1, 1)
    return out


def _older(model_dir: Path, out: Path) -> None:
    """Links to the files of ``model_dir``, and a tokenizer config whose class transformers 4 knows."""
    out.mkdir(parents=True)
    for path in (*read_shards(model_dir).files, *model_dir.glob("*.json")):
        (out / path.name).symlink_to(path)
    config = json.loads((model_dir / "tokenizer_config.json").read_bytes())
    (out / "tokenizer_config.json").unlink()
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(config))


def command(prepared: Path, tokens_file: Path, threads: int) -> Sequence[str]:
    """The program. Seconds to minutes a token: give it a stream of one or two."""
    return AIRLLM.program("airllm_run", str(prepared), "--tokens", str(tokens_file), "--threads", str(threads))


def files(prepared: Path) -> Sequence[Path]:
    return sorted((prepared / SPLIT).rglob("*.safetensors"))
