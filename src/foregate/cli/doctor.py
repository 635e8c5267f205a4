"""``foregate doctor``: what this machine offers an engine that reads experts from disk."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from foregate.cli.output import print_json, result, size, two_columns
from foregate.errors import BudgetError, ConfigError

PACKAGES = ("foregate", "torch", "transformers", "safetensors", "tokenizers", "numpy")


def doctor(
    directory: Annotated[Path, typer.Option("--dir", help="Where the model lies: its disk is measured.")] = Path(),
    expert_size: Annotated[str, typer.Option(help="Bytes of one read, like one expert of your model.")] = "8MiB",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Memory, disk speed at expert size, O_DIRECT, compiled kernels, GPU and versions."""
    from foregate.config import parse_budget
    from foregate.experts.diskspeed import measure
    from foregate.native.kernels import instructions

    try:
        nbytes = parse_budget(expert_size).nbytes
    except BudgetError:
        nbytes = None
    if nbytes is None:
        raise ConfigError(f"expert size {expert_size!r} is not a size in bytes, such as 8MiB")
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory")
    speed = measure(directory, nbytes)
    found = {
        "memory": memory(),
        "disk": {"directory": str(directory.resolve()), "free_bytes": shutil.disk_usage(directory).free, **speed},
        "cpu": {"cores": os.cpu_count(), "machine": platform.machine(), "flags": cpu_flags()},
        "kernels": instructions(),
        "gpu": gpu(),
        "versions": versions(),
    }
    if as_json:
        print_json(found)
    else:
        show(found)


def memory() -> dict[str, int]:
    """Bytes of RAM, what is free of it, and the tightest limit on this process."""
    from foregate.engine.memory import memory_limit

    ram = psutil.virtual_memory()
    return {"total_bytes": int(ram.total), "available_bytes": int(ram.available), "limit_bytes": memory_limit()}


def cpu_flags() -> list[str]:
    """Instruction sets that matter for low-precision matmuls."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return [flag for flag in wanted if flag in flags]


def gpu() -> list[str]:
    """Names of the CUDA devices that torch sees."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def versions() -> dict[str, str]:
    """Python and the packages that decide whether a result can be repeated."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def show(found: dict[str, Any]) -> None:
    """The same as a table."""
    ram, disk = found["memory"], found["disk"]
    direct = "yes" if disk["direct_io"] else f"no ({disk['why']}): reads are buffered and dropped from the page cache"
    rows = [
        ("memory", f"{size(ram['total_bytes'])}, {size(ram['available_bytes'])} available"),
        ("limit on this process", size(ram["limit_bytes"])),
        ("disk", f"{disk['directory']}, {size(disk['free_bytes'])} free"),
        ("O_DIRECT", direct),
        *[(f"read {size(disk['read_bytes'])}, {n} at once", f"{gbs:.2f} GB/s") for n, gbs in disk["gb_per_s"].items()],
        ("cpu", f"{found['cpu']['cores']} cores, {' '.join(found['cpu']['flags']) or 'no wide vectors'}"),
        ("expert kernels", "torch (no compiled kernels)" if found["kernels"] == "torch" else found["kernels"]),
        ("gpu", ", ".join(found["gpu"]) or "none"),
        *found["versions"].items(),
    ]
    result().print(two_columns("foregate doctor", rows))
