"""Read-ahead of the block device under a file, set for a while and put back whatever happens.

``with read_ahead(path, 128): …``. It decides how much of a file every page fault reads, so it decides how fast programs
are that map their weights. A small watcher process puts the old value back when this one ends, killed or not.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foregate.errors import ForegateError

USUAL_KIB = 128
"""The kernel's default, and so what users have."""

SYS = Path("/sys")
STATE = Path("/run/foregate")
"""Emptied by a reboot, as the setting is."""


class HeldError(ForegateError):
    """Another process measures with a read-ahead of its own."""


_WATCHER = 'cat > /dev/null; echo "$1" > "$2" && rm -f "$3"'


@contextmanager
def read_ahead(path: Path, kib: int = USUAL_KIB, *, sys: Path = SYS, state: Path = STATE) -> Iterator[int]:
    """Files on the device of ``path`` are opened with ``kib`` KiB of read-ahead. Yields the value there was before.

    Whole device, whole machine; only files opened inside the block are sure to see it. Raises ForegateError without
    root, where no block device lies under ``path``, and while another process holds the setting.
    """
    setting = setting_of(path, sys=sys)
    marker = state / f"read-ahead-{setting.parent.parent.name}.json"
    restore(marker)
    before = int(setting.read_text())
    if before == kib:
        yield before
        return
    _claim(marker, setting, before)
    watcher = _watch(before, setting, marker)
    try:
        _write(setting, kib)
        yield before
    finally:
        watcher.communicate()
        if watcher.returncode:
            raise ForegateError(f"{setting} could not be put back to {before}: write it by hand")


def setting_of(path: Path, *, sys: Path = SYS) -> Path:
    """The file in /sys that holds the read-ahead of the device under ``path``. Raises ForegateError."""
    device = path.stat().st_dev
    place = sys / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}"
    # a partition has no queue of its own
    for holder in (place, place.resolve().parent):
        if (holder / "queue" / "read_ahead_kb").is_file():
            return (holder / "queue" / "read_ahead_kb").resolve()
    raise ForegateError(f"{path}: no block device of its own ({place} has no read-ahead), so it cannot be set")


def restore(marker: Path) -> None:
    """Put back what a run left behind whose watcher was killed too. Raises ForegateError while that run lives."""
    try:
        left = json.loads(marker.read_text())
        setting, before, owner = Path(left["setting"]), int(left["before"]), int(left["pid"])
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ForegateError(f"{marker}: unreadable ({error!r}); set the read-ahead by hand and remove it") from error
    if _started(owner) == left.get("started"):
        raise HeldError(f"{setting} is held by process {owner}; wait for its end")
    _write(setting, before)
    marker.unlink(missing_ok=True)


def _claim(marker: Path, setting: Path, before: int) -> None:
    said = {"setting": str(setting), "before": before, "pid": os.getpid(), "started": _started(os.getpid())}
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        with marker.open("x") as file:
            json.dump(said, file)
    except FileExistsError:
        raise HeldError(f"{setting} was taken by another process just now ({marker})") from None
    except OSError as error:
        raise ForegateError(f"setting the read-ahead needs root: {marker}: {error.strerror}") from error


def _watch(before: int, setting: Path, marker: Path) -> subprocess.Popen[bytes]:
    """Waits for the end of its input, which is this process's end at the latest; its own session, so no Ctrl-C."""
    command = ["/bin/sh", "-c", _WATCHER, "read-ahead", str(before), str(setting), str(marker)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _write(setting: Path, kib: int) -> None:
    try:
        setting.write_text(str(kib))
    except OSError as error:
        raise ForegateError(f"setting the read-ahead to {kib} KiB needs root: {setting}: {error.strerror}") from error


def _started(pid: int) -> str | None:
    """When process ``pid`` started, in ticks since boot; None if there is none. Tells a reused id apart."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
