"""The physical limits of this machine for this model, measured first: what no engine can beat here.

Shapes: D hidden, F expert hidden.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch

from foregate.checkpoint.locate import locate
from foregate.checkpoint.manifest import EXPERTS_FILE
from foregate.checkpoint.naming import layouts
from foregate.checkpoint.opening import Checkpoint, open_checkpoint
from foregate.checkpoint.readplan import CHUNK_BYTES
from foregate.experts.diskspeed import FILE_BYTES, disk_speed
from foregate.experts.kernel_speed import KINDS, KernelSpeed, kernel_speed
from foregate.experts.readers import fewest

CHUNKS = (CHUNK_BYTES, 4 * CHUNK_BYTES)
"""Bytes of one read within an expert: the engine's own, and a larger one."""

MEMORY_BYTES = 256 << 20
"""Of experts that a kernel goes through: more than any cache."""

MOST_EXPERTS = 128
"""The same for a toy, whose experts then fit the processor's cache."""

ROUNDS = 3
"""Of each kernel measurement, after one that is not counted."""

MOST_READS = 256
"""For one figure of the disk: experts of a toy would take minutes to fill FILE_BYTES."""

Say = Callable[[str], None]


def physical_limits(model: str, threads: int | None, say: Say = lambda text: None) -> dict[str, Any]:
    """Disk, memory and kernels, each alone; what reads cost arithmetic is measured in the arms. docs/bench.md.

    Raises ForegateError where the weights cannot be read.
    """
    checkpoint = open_checkpoint(locate(model))
    if threads:
        torch.set_num_threads(threads)
    file, nbytes = weights_file(checkpoint), checkpoint.spec.expert_slot_bytes
    say("limits: disk")
    chunks = [chunk for chunk in CHUNKS if chunk == CHUNK_BYTES or chunk < nbytes]
    disk = disk_speed(file, nbytes, chunks=chunks, point_bytes=min(FILE_BYTES, MOST_READS * nbytes))
    by_depth = {point.depth: point.gb_per_s for point in disk if point.chunk_bytes == CHUNK_BYTES}
    matmul = {}
    for kind in KINDS:
        say(f"limits: {kind}")
        matmul[kind] = _figures(_kernel(kind, checkpoint))
    return {
        "expert_bytes": nbytes,
        "disk_file": file.name,
        "disk_gb_per_s": by_depth,
        "disk_gb_per_s_best": max(point.gb_per_s for point in disk),
        "disk": [asdict(point) for point in disk],
        "direct_io": reads_direct(file),
        "memory_read_gb_per_s": max(speed["read_gb_per_s"] for speed in matmul.values()),
        "matmul": matmul,
        "format": own_format(checkpoint),
        "readers": fewest(by_depth),
        "threads": torch.get_num_threads(),
    }


def weights_file(checkpoint: Checkpoint) -> Path:
    """The file that holds the experts: the pack's own, or an original's largest."""
    if checkpoint.packed:
        return checkpoint.directory / EXPERTS_FILE
    return max(checkpoint.shards.files, key=lambda file: file.stat().st_size)


def reads_direct(file: Path) -> bool:
    """Whether ``file`` can be read past the page cache."""
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def own_format(checkpoint: Checkpoint) -> str:
    """The format of most experts, as ``kernel_speed`` names it; the nearest one where it has none (int4/128, fp32)."""
    name = checkpoint.precision.experts.name
    if name == "source":
        return "bf16"
    return name if name in KINDS else "int4/64"


def expert_width(checkpoint: Checkpoint) -> int:
    """F, from the shape of the down projection before any quantising."""
    _, layout = next(iter(layouts(checkpoint.skeleton)))
    down = next(param for param in layout.params if param.name == "down_proj")
    return prod(down.shape) // checkpoint.spec.hidden_size


def _kernel(kind: str, checkpoint: Checkpoint) -> KernelSpeed:
    spec = checkpoint.spec
    memory = min(MEMORY_BYTES, MOST_EXPERTS * spec.expert_slot_bytes)
    width = expert_width(checkpoint)
    return kernel_speed(kind, hidden=spec.hidden_size, width=width, rounds=ROUNDS, memory_bytes=memory)


def _figures(speed: KernelSpeed) -> dict[str, Any]:
    names = ("expert_us", "gb_per_s", "read_gb_per_s", "share", "instructions")
    return {name: getattr(speed, name) for name in names}
