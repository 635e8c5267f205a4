"""How much memory this process may use, how much it has used, and what a budget means in expert slots."""

from __future__ import annotations

import os
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


@dataclass(frozen=True, slots=True)
class Staging:
    """Slots set aside for speculative reads while decoding; where 0, ``off_reason`` says why."""

    slots: int
    off_reason: str = ""


def overhead(*, slot_bytes: int, readers: int, packed: bool) -> int:
    """Bytes beside budget, dense weights and KV cache. Original files are read through buffers of about one expert:
    at most two for each reader (a demand read and a speculative one that it overtook)."""
    return FIXED_OVERHEAD + (0 if packed else 2 * readers * (slot_bytes + 2**16))


def keep_few_products() -> None:
    """Before the first product of matrices: oneDNN would keep 1,024 prepared ones, one for every number of rows. After
    a long prompt those are 100 MB that no budget counts."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def plan_slots(
    budget: str, *, slot_bytes: int, experts: int, dense_bytes: int, overhead_bytes: int = FIXED_OVERHEAD
) -> SlotPlan:
    """Slots that ``budget`` pays for, at most one per expert. Raises BudgetError with the minimum (one slot)."""
    nbytes = _bytes(parse_budget(budget), slot_bytes * experts, dense_bytes + overhead_bytes)
    slots = min(nbytes // slot_bytes, experts)
    if slots < 1:
        raise BudgetError(
            f"memory budget {budget} is {nbytes:,} bytes; "
            f"the minimum for this model is {slot_bytes:,} bytes (one expert)"
        )
    return SlotPlan(nbytes, slots, slot_bytes)


def plan_staging(plan: SlotPlan, experts: int, top_k: int, *, limit: int | None, reach: int) -> Staging:
    """``limit`` reads a layer (None: ``top_k``) for each of ``reach`` layers, but at most a quarter of the slots.

    ``experts`` are all of the model's; ``top_k`` slots are left to the layer at hand.
    """
    if limit == 0:
        return Staging(0, "prefetch is off")
    if plan.slots >= experts:
        return Staging(0, "all experts fit in the budget")
    slots = min((limit or top_k) * reach, plan.slots // 4, plan.slots - top_k)
    if slots < 1:
        return Staging(0, f"a budget of {plan.slots} slots leaves none for staging")
    return Staging(slots)


def _bytes(budget: Budget, expert_bytes: int, taken_bytes: int) -> int:
    if budget.nbytes is not None:
        return budget.nbytes
    if budget.share is not None:
        return int(expert_bytes * budget.share + 1e-6)
    room = memory_free() - taken_bytes
    # A tenth of the room stays free for the KV cache and activations, which grow with the context.
    return min(expert_bytes, int(room * 0.9)) if room > 0 else 0


def memory_limit() -> int:
    """Bytes this process may use: the machine's memory, or a tighter cgroup limit (v1 or v2)."""
    limits = [limit for limit, _ in _cgroups()]
    return min([int(psutil.virtual_memory().total), *limits])


def memory_free() -> int:
    """Bytes that can still be taken: the machine's available memory, or what the tightest cgroup has left."""
    return min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _cgroups())])


def _cgroups() -> list[tuple[int, int]]:
    """(limit, used without reclaimable page cache) of every memory cgroup around this process that has a limit."""
    found = []
    for folder, limit_name, used_name in _cgroup_folders():
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is not None and used is not None and limit < _UNLIMITED:
            found.append((limit, max(0, used - _reclaimable(folder))))
    return found


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(folder: Path) -> int:
    """Bytes of page cache that the kernel gives up first."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    stat = dict(line.split()[:2] for line in lines)
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _cgroup_folders() -> list[tuple[Path, str, str]]:
    """Folders of this process's memory cgroup and its ancestors, with the names of their limit and usage files."""
    root = Path("/sys/fs/cgroup")
    found: list[tuple[Path, str, str]] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            found += [(folder, *names) for folder in _chain(root / "memory", path)]
        elif not controllers:
            found += [(folder, "memory.max", "memory.current") for folder in _chain(root, path)]
    return found


def _chain(root: Path, path: str) -> list[Path]:
    here = root / path.lstrip("/")
    return [folder for folder in (here, *here.parents) if folder.is_relative_to(root)]


def rss_peak() -> int:
    """Peak resident set of this process in bytes (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
