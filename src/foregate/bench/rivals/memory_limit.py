"""The memory limit of the control group in which this process runs. Linux, cgroup v1 or v2."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_NONE = 1 << 62
"""Version 1 writes a number just below 2^63 for no limit."""


def memory_limit(membership: str | None = None, root: Path = ROOT) -> int | None:
    """Bytes, the tightest limit from this process's group upwards; None if there is none.

    ``membership`` is the content of /proc/self/cgroup.
    """
    lines = (Path("/proc/self/cgroup").read_text() if membership is None else membership).splitlines()
    limits = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if "memory" in controllers.split(","):
            limits += _limits(root / "memory", place, "memory.limit_in_bytes")
        elif not controllers:
            limits += _limits(root, place, "memory.max")
    return min(limits, default=None)


def _limits(root: Path, place: str, name: str) -> list[int]:
    found = []
    group = root / place.lstrip("/")
    for directory in (group, *group.parents):
        if not directory.is_relative_to(root):
            break
        try:
            text = (directory / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < _NONE:
            found.append(int(text))
    return found
