"""What a result depends on and must be told with: code, model, pack, predictors, kernel, disk."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from foregate import __version__
from foregate.checkpoint.locate import locate
from foregate.checkpoint.opening import Checkpoint, open_checkpoint
from foregate.checkpoint.origin import original_fingerprint
from foregate.native.kernels import instructions
from foregate.predictors import choice
from foregate.predictors.file import load


def provenance(
    model: str, prompts: Mapping[str, Sequence[int]], *, tokens: int, rounds: int, predictors: Sequence[str]
) -> dict[str, Any]:
    """Everything that is not a measurement."""
    checkpoint = open_checkpoint(locate(model))
    return {
        "model": _model(model, checkpoint),
        "predictors": {name: _predictor(name) for name in predictors},
        "prompts": {name: {"tokens": len(ids), "xxh3": _hash(ids)} for name, ids in prompts.items()},
        "tokens": tokens,
        "rounds": rounds,
        "foregate": __version__,
        "commit": commit(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "instructions": instructions(),
        "disk": disk(checkpoint.directory),
    }


def _model(name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    pack = checkpoint.manifest
    return {
        "name": name,
        "fingerprint": checkpoint.fingerprint,
        "inflated_from": original_fingerprint(checkpoint.directory) or None,
        "packed": checkpoint.packed,
        "pack": None if pack is None else {**checkpoint.precision.to_json(), "expert_bytes": pack.experts_nbytes},
    }


def _predictor(name: str) -> dict[str, Any]:
    """A file by its content and that of the traces it was trained on; a method by its name alone."""
    if not choice.is_file(name):
        return {"method": name, "file": False}
    path = Path(name).expanduser()
    artifact = load(path)
    content = xxhash.xxh3_128(path.read_bytes()).hexdigest()
    return {"method": artifact.method, "file": True, "xxh3": content, "trace_hash": artifact.trace_hash or None}


def _hash(ids: Sequence[int]) -> str:
    return xxhash.xxh3_64(b",".join(str(number).encode() for number in ids)).hexdigest()


def commit() -> str | None:
    """Commit of the source tree that runs, where it is one; ``-dirty`` where it has changes."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def cpu_model() -> str | None:
    """As /proc/cpuinfo has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def disk(directory: Path) -> dict[str, Any]:
    """Name, model, kind and read-ahead of the block device under ``directory``; what cannot be told is None."""
    device = directory.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    whole = place if (place / "queue").is_dir() else place.parent
    known = (whole / "queue").is_dir()
    rotational = _text(whole / "queue" / "rotational")
    return {
        "name": whole.name if known else None,
        "model": _text(whole / "device" / "model") or _driver(whole),
        "rotational": rotational == "1" if rotational else None,
        "read_ahead_kib": int(_text(whole / "queue" / "read_ahead_kb") or 0) or None,
        "scheduler": _text(whole / "queue" / "scheduler"),
    }


def _driver(whole: Path) -> str | None:
    """A virtual disk has no model: the driver's name, such as virtio_blk."""
    driver = whole / "device" / "driver"
    return driver.resolve().name if driver.exists() else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip() or None
    except OSError:
        return None
