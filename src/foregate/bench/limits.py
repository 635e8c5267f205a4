"""The physical limits of this machine for this model, measured first: what no engine can beat here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch

from foregate.checkpoint.locate import locate
from foregate.checkpoint.opening import open_checkpoint
from foregate.experts.diskspeed import measure

REPEATS = 5


def physical_limits(model: str, threads: int | None, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Disk GB/s at expert size by queue depth, memory read GB/s, and how much slower memory is while the disk works."""
    checkpoint = open_checkpoint(locate(model))
    spec = checkpoint.spec
    if threads:
        torch.set_num_threads(threads)
    say("disk")
    disk = measure(checkpoint.directory, spec.expert_slot_bytes)
    say("memory")
    buffer = torch.randint(0, 255, (1 << 28,), dtype=torch.uint8).view(torch.int64)
    quiet = _memory_gb_per_s(buffer)
    say("contention")
    loaded = _while_reading(checkpoint.directory, spec.expert_slot_bytes, lambda: _memory_gb_per_s(buffer))
    return {
        "expert_bytes": spec.expert_slot_bytes,
        "disk_gb_per_s": disk["gb_per_s"],
        "disk_gb_per_s_best": max(disk["gb_per_s"].values()),
        "direct_io": disk["direct_io"],
        "memory_read_gb_per_s": quiet,
        "memory_read_gb_per_s_while_reading": loaded,
        "contention": max(1.0, quiet / loaded),
        "threads": torch.get_num_threads(),
    }


def _memory_gb_per_s(buffer: torch.Tensor) -> float:
    """Median GB/s of summing ``buffer`` (larger than any cache): a plain read of memory."""
    seconds = []
    for _ in range(REPEATS):
        began = perf_counter()
        buffer.sum()
        seconds.append(perf_counter() - began)
    return buffer.nbytes / median(seconds) / 1e9


def _while_reading(directory: Any, nbytes: int, work: Callable[[], float]) -> float:
    """What ``work`` gives while the disk reads all the time."""
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            measure(directory, nbytes)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        return work()
    finally:
        over.set()
        reader.join()
