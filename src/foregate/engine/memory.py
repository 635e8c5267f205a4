"""How much memory this process may use, how much it has used, and what a budget means in expert slots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from foregate.config import Budget, parse_budget
from foregate.errors import BudgetError

FIXED_OVERHEAD = 768 * 2**20
"""Bytes. Interpreter, torch, transformers, tokenizer and read buffers: 0.55-0.7 GiB measured; stated in the README."""

_UNLIMITED = 2**60


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """A budget turned into slots. ``budget_bytes`` is what was asked for; ``slots * slot_bytes`` never exceeds it."""

    budget_bytes: int
    slots: int
    slot_bytes: int


def plan_slots(budget: str, *, slot_bytes: int, experts: int, dense_bytes: int) -> SlotPlan:
    """Slots that ``budget`` pays for, at most one per expert. Raises BudgetError with the minimum (one slot)."""
    nbytes = _bytes(parse_budget(budget), slot_bytes * experts, dense_bytes)
    slots = min(nbytes // slot_bytes, experts)
    if slots < 1:
        raise BudgetError(
            f"memory budget {budget} is {nbytes:,} bytes; "
            f"the minimum for this model is {slot_bytes:,} bytes (one expert)"
        )
    return SlotPlan(nbytes, slots, slot_bytes)


def _bytes(budget: Budget, expert_bytes: int, dense_bytes: int) -> int:
    if budget.nbytes is not None:
        return budget.nbytes
    if budget.share is not None:
        return int(expert_bytes * budget.share + 1e-6)
    room = memory_limit() - memory_used() - dense_bytes - FIXED_OVERHEAD
    # A tenth of the room stays free for the KV cache and activations, which grow with the context.
    return min(expert_bytes, int(room * 0.9)) if room > 0 else 0


def memory_limit() -> int:
    """Bytes this process may use: the machine's memory, or a tighter cgroup limit (v1 or v2)."""
    return min([int(psutil.virtual_memory().total), *_cgroup_limits()])


def memory_used() -> int:
    """Bytes already taken: by everyone on the machine, or inside the cgroup where that is what limits."""
    total = psutil.virtual_memory()
    limits = _cgroup_limits()
    if limits and min(limits) < total.total:
        return int(psutil.Process().memory_info().rss)
    return int(total.total - total.available)


def _cgroup_limits() -> list[int]:
    found = []
    for path in _cgroup_files():
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < _UNLIMITED:
            found.append(int(text))
    return found


def _cgroup_files() -> list[Path]:
    """Limit files of this process's cgroup and its ancestors."""
    root = Path("/sys/fs/cgroup")
    files: list[Path] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return files
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            files += _chain(root / "memory", path, "memory.limit_in_bytes")
        elif not controllers:
            files += _chain(root, path, "memory.max")
    return files


def _chain(root: Path, path: str, name: str) -> list[Path]:
    here = root / path.lstrip("/")
    return [folder / name for folder in (here, *here.parents) if folder.is_relative_to(root)]


def rss_peak() -> int:
    """Peak resident set of this process in bytes (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
