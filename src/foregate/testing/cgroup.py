"""Run a command under a hard memory limit: cgroup v1, cgroup v2, or systemd-run for those who are not root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import sleep

from foregate.errors import ConfigError, ForegateError

ROOT = Path("/sys/fs/cgroup")
KINDS = ("auto", "v1", "v2", "systemd-run")


@dataclass(frozen=True, slots=True)
class Limited:
    """How a limited command ended. ``peak_bytes`` counts page cache too; None where the kernel does not tell."""

    returncode: int
    stdout: str
    stderr: str
    peak_bytes: int | None


def available() -> str | None:
    """The best kind that works here, or None."""
    if os.access(ROOT / "memory", os.W_OK) and (ROOT / "memory" / "memory.limit_in_bytes").exists():
        return "v1"
    if os.access(ROOT, os.W_OK) and "memory" in _read(ROOT / "cgroup.subtree_control").split():
        return "v2"
    return "systemd-run" if shutil.which("systemd-run") and Path("/run/systemd/system").exists() else None


def run_limited(command: Sequence[str], limit_bytes: int, kind: str = "auto") -> Limited:
    """Run ``command`` in at most ``limit_bytes`` of memory, swap excluded; the kernel kills it above that.

    Raises ConfigError for an unknown kind, ForegateError where no memory limit can be set.
    """
    if kind not in KINDS:
        raise ConfigError(f"cgroup kind {kind!r} is not one of: {', '.join(KINDS)}")
    chosen = available() if kind == "auto" else kind
    if chosen is None:
        raise ForegateError("no way to limit memory here: neither a writable cgroup nor systemd-run")
    if chosen == "systemd-run":
        return _systemd(command, limit_bytes)
    with _group(chosen, limit_bytes) as group:
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=lambda: _join(group))
        return Limited(done.returncode, done.stdout, done.stderr, _peak(group))


def _systemd(command: Sequence[str], limit_bytes: int) -> Limited:
    user = [] if os.geteuid() == 0 else ["--user"]
    properties = ["-p", f"MemoryMax={limit_bytes}", "-p", "MemorySwapMax=0"]
    done = subprocess.run(
        ["systemd-run", *user, "--scope", "--quiet", "--collect", *properties, "--", *command],
        capture_output=True,
        text=True,
    )
    return Limited(done.returncode, done.stdout, done.stderr, None)


@contextmanager
def _group(kind: str, limit_bytes: int) -> Iterator[Path]:
    group = (ROOT / "memory" if kind == "v1" else ROOT) / f"foregate-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise ForegateError(f"cannot make the cgroup {group}: {error.strerror}") from error
    try:
        (group / ("memory.limit_in_bytes" if kind == "v1" else "memory.max")).write_text(str(limit_bytes))
        _without_swap(group, kind, limit_bytes)
        yield group
    finally:
        _remove(group)


def _without_swap(group: Path, kind: str, limit_bytes: int) -> None:
    file = group / ("memory.memsw.limit_in_bytes" if kind == "v1" else "memory.swap.max")
    if file.exists():
        file.write_text(str(limit_bytes if kind == "v1" else 0))


def _join(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _peak(group: Path) -> int | None:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        text = _read(group / name).strip()
        if text:
            return int(text)
    return None


def _remove(group: Path) -> None:
    for _ in range(50):
        try:
            group.rmdir()
            return
        except OSError:  # the last process may still be on its way out
            sleep(0.1)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
