"""The physical limits of this machine for this model, measured first: what no engine can beat here.

Shapes: D hidden, F expert hidden.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch

from foregate.checkpoint.locate import locate
from foregate.checkpoint.manifest import EXPERTS_FILE
from foregate.checkpoint.naming import layouts
from foregate.checkpoint.opening import Checkpoint, open_checkpoint
from foregate.checkpoint.readplan import CHUNK_BYTES
from foregate.errors import ForegateError
from foregate.experts.diskspeed import FILE_BYTES, disk_speed
from foregate.experts.kernel_speed import KINDS, KernelSpeed, kernel_speed

CHUNKS = (CHUNK_BYTES, 4 * CHUNK_BYTES)
"""Bytes of one read within an expert: the engine's own, and a larger one."""

ENOUGH = 0.92
"""Share of the best disk speed. The fewest readers that reach it are what a run would take."""

MEMORY_BYTES = 256 << 20
"""Of experts that a kernel goes through: more than any cache."""

MOST_EXPERTS = 128
"""The same for a toy, whose experts then fit the processor's cache."""

ROUNDS = 3
"""Of each kernel measurement, after one that is not counted."""

MOST_READS = 256
"""For one figure of the disk: experts of a toy would take minutes to fill FILE_BYTES."""

STRETCH = 8
"""Experts read between two looks whether the computing is over."""

Say = Callable[[str], None]


def physical_limits(model: str, threads: int | None, say: Say = lambda text: None) -> dict[str, Any]:
    """Disk, memory, kernels, and how much slower kernels are while a run's readers work. docs/bench.md has each figure.

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
    own, readers = own_format(checkpoint), fewest(by_depth)
    say("limits: contention")
    quiet = _kernel(own, checkpoint)
    loaded, reading = _while_reading(file, nbytes, readers, lambda: _kernel(own, checkpoint))
    return {
        "expert_bytes": nbytes,
        "disk_file": file.name,
        "disk_gb_per_s": by_depth,
        "disk_gb_per_s_best": max(point.gb_per_s for point in disk),
        "disk": [asdict(point) for point in disk],
        "direct_io": reads_direct(file),
        "memory_read_gb_per_s": max(speed["read_gb_per_s"] for speed in matmul.values()),
        "matmul": matmul,
        "format": own,
        "matmul_gb_per_s_while_reading": loaded.gb_per_s,
        "disk_gb_per_s_while_computing": reading,
        "readers": readers,
        "contention": max(1.0, quiet.gb_per_s / loaded.gb_per_s),
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


def fewest(speeds: Mapping[int, float]) -> int:
    """The smallest depth that reads at nearly full speed: what a run's readers settle on."""
    return min(depth for depth, speed in speeds.items() if speed >= ENOUGH * max(speeds.values()))


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


def _while_reading(file: Path, nbytes: int, readers: int, work: Callable[[], KernelSpeed]) -> tuple[KernelSpeed, float]:
    """What ``work`` gives while ``readers`` read experts all the time, and the GB/s that they reach meanwhile."""
    over = threading.Event()
    found: list[float] = []
    failed: list[BaseException] = []

    def read() -> None:
        try:
            while not over.is_set():
                found.append(disk_speed(file, nbytes, depths=(readers,), point_bytes=STRETCH * nbytes)[0].gb_per_s)
        except ForegateError as error:
            failed.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        speed = work()
    finally:
        over.set()
        reader.join()
    if failed:
        raise failed[0]
    return speed, median(found)
