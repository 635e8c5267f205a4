"""Run a command under a hard memory limit, and with a slower disk: cgroup v1, v2, or systemd-run for non-roots."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import sleep

from foregate.errors import ConfigError, ForegateError

ROOT = Path("/sys/fs/cgroup")
KINDS = ("auto", "v1", "v2", "systemd-run")
_NUMBERS = count()


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
    with confined(Limits(limit_bytes), kind) as box:
        done = subprocess.run(box.command(command), capture_output=True, text=True, preexec_fn=box.join)
        return Limited(done.returncode, done.stdout, done.stderr, box.peak_bytes())


@dataclass(frozen=True, slots=True)
class Limits:
    """What a confined process may use: bytes of memory, and bytes a second read from the disk that holds ``path``."""

    memory_bytes: int
    read_bps: int | None = None
    path: Path | None = None


class Box:
    """Where confined processes go: wrap the command in ``command`` and pass ``join`` as ``preexec_fn``."""

    def __init__(self, groups: Sequence[Path], prefix: Sequence[str] = ()) -> None:
        self._groups = groups
        self._prefix = prefix

    def command(self, command: Sequence[str]) -> list[str]:
        return [*self._prefix, *command]

    def join(self) -> None:
        """Called in the child, before it becomes the command."""
        for group in self._groups:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    def used(self) -> tuple[int, int] | None:
        """Bytes of anonymous memory and of page cache now; None where the kernel does not tell."""
        return next((found for found in map(_used, self._groups) if found is not None), None)

    def peak_bytes(self) -> int | None:
        """Most memory used, page cache included; None where the kernel does not tell."""
        peaks = [_peak(group) for group in self._groups]
        return next((peak for peak in peaks if peak is not None), None)


@contextmanager
def confined(limits: Limits, kind: str = "auto") -> Iterator[Box]:
    """A box with ``limits``, gone afterwards.

    Raises ConfigError for an unknown kind, ForegateError where memory cannot be limited here, or reads cannot be
    throttled, or no longer were at the end.
    """
    if kind not in KINDS:
        raise ConfigError(f"cgroup kind {kind!r} is not one of: {', '.join(KINDS)}")
    chosen = available() if kind == "auto" else kind
    if chosen is None:
        raise ForegateError("no way to limit memory here: neither a writable cgroup nor systemd-run")
    if chosen == "systemd-run":
        prefix = _systemd(limits)
        _prove_systemd(prefix, limits)
        yield Box((), prefix)
        return
    with _group(chosen, "memory", lambda group: _limit_memory(group, chosen, limits.memory_bytes)) as memory:
        if chosen == "v2":
            if limits.read_bps is not None:
                _throttle(memory, "v2", limits)
            yield Box([memory])
            _prove_v2(memory, limits)
        elif limits.read_bps is None:
            yield Box([memory])
        else:
            with _group("v1", "blkio", lambda group: _throttle(group, "v1", limits)) as blkio:
                yield Box([memory, blkio])


def _systemd(limits: Limits) -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user"]
    properties = ["-p", f"MemoryMax={limits.memory_bytes}", "-p", "MemorySwapMax=0"]
    if limits.read_bps is not None:
        properties += ["-p", f"IOReadBandwidthMax={_throttled_path(limits)} {limits.read_bps}"]
    return ["systemd-run", *user, "--scope", "--quiet", "--collect", *properties, "--"]


def _prove_systemd(prefix: Sequence[str], limits: Limits) -> None:
    """Raise ForegateError unless a command behind ``prefix`` is limited: a user's systemd passes by what it may not."""
    command = [*prefix, "sh", "-c", "echo inside; read _"]
    pipe = subprocess.PIPE
    try:
        with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as probe:
            assert probe.stdout is not None
            inside = probe.stdout.readline()
            memory, disk = _group_of(probe.pid, "memory"), [_group_of(probe.pid, name) for name in ("io", "blkio")]
            limited, throttled = _memory_limit(memory), {bps for group in disk for bps in _read_limits(group)}
            swaps = _swapping() and _read(memory / "memory.swap.max").strip() != "0"
            _, said = probe.communicate("\n")
    except OSError as error:
        raise ForegateError(f"{prefix[0]} cannot be run: {error.strerror}") from error
    if not inside:
        raise ForegateError(f"systemd-run: {(said.splitlines() or [f'exit code {probe.returncode}'])[0]}")
    if limited is None or limited > limits.memory_bytes or swaps:
        raise ForegateError(
            f"systemd-run cannot limit {'swap' if swaps else 'memory'} here: its scope has no such limit"
        )
    if limits.read_bps is not None and limits.read_bps not in throttled:
        raise ForegateError("reads cannot be throttled: systemd-run does not do it here (a user's needs Delegate=io)")


def _prove_v2(group: Path, limits: Limits) -> None:
    """Raise ForegateError where a limit is gone in the end: systemd, whose the controllers are, may take one back."""
    if _memory_limit(group) is None:
        raise ForegateError("the memory limit was lifted while it ran: systemd took memory from its groups")
    if limits.read_bps is not None and limits.read_bps not in _read_limits(group):
        raise ForegateError("the throttle was lifted while it ran: systemd took io from its groups; try systemd-run")


def _group_of(pid: int, controller: str) -> Path:
    """The group that limits process ``pid``: that of a version 1 controller, or the unified one."""
    groups = [line.split(":", 2)[1:] for line in _read(Path(f"/proc/{pid}/cgroup")).splitlines()]
    for controllers, path in groups:
        if controller in controllers.split(","):
            return ROOT / controller / path[1:]
    return ROOT / next((path[1:] for controllers, path in groups if not controllers), "")


def _memory_limit(group: Path) -> int | None:
    text = (_read(group / "memory.max") or _read(group / "memory.limit_in_bytes")).strip()
    return int(text) if text.isdigit() else None


def _read_limits(group: Path) -> set[int]:
    """Bytes a second, of every disk that has a limit."""
    told = re.findall(r"rbps=(\d+)", _read(group / "io.max"))
    told += re.findall(r"^\S+ (\d+)$", _read(group / "blkio.throttle.read_bps_device"), re.MULTILINE)
    return {int(number) for number in told}


def _swapping() -> bool:
    return len(_read(Path("/proc/swaps")).splitlines()) > 1


@contextmanager
def _group(kind: str, controller: str, limit: Callable[[Path], None]) -> Iterator[Path]:
    root = ROOT / controller if kind == "v1" else ROOT
    group = root / f"foregate-{os.getpid()}-{next(_NUMBERS)}"
    _sweep(root)
    try:
        group.mkdir()
    except OSError as error:
        raise ForegateError(f"cannot make the cgroup {group}: {error.strerror}") from error
    try:
        limit(group)
        yield group
    finally:
        _remove(group)


def _sweep(root: Path) -> None:
    """Remove what killed runs have left: groups whose maker is gone and in which nothing runs."""
    for left in root.glob("foregate-*-*"):
        if not Path(f"/proc/{left.name.split('-')[1]}").exists():
            with suppress(OSError):
                left.rmdir()


def _limit_memory(group: Path, kind: str, limit_bytes: int) -> None:
    _hand_down(kind, "memory")
    memory = ("memory.limit_in_bytes", limit_bytes) if kind == "v1" else ("memory.max", limit_bytes)
    swap = ("memory.memsw.limit_in_bytes", limit_bytes) if kind == "v1" else ("memory.swap.max", 0)
    for what, (name, value) in (("memory", memory), ("swap", swap)):
        if what == "memory" or _swapping() or (group / name).exists():
            _set(group / name, str(value), f"cgroup {kind} cannot limit {what} here")


def _set(file: Path, text: str, otherwise: str) -> None:
    """Raises ForegateError: ``otherwise``, and why."""
    if not file.exists():  # where no such hierarchy is mounted, writing would make a plain file
        raise ForegateError(f"{otherwise}: {file.parent.parent} gives no {file.name}")
    try:
        file.write_text(text)
    except OSError as error:
        raise ForegateError(f"{otherwise}: {file}: {error.strerror}") from error


def _hand_down(kind: str, controller: str) -> None:
    """Let version 2's top groups have ``controller``: systemd does so for those alone that one of its units needs."""
    control = ROOT / "cgroup.subtree_control"
    if kind == "v2" and control.exists() and controller not in _read(control).split():
        with suppress(OSError):  # then the group has no such file, which is told there
            control.write_text(f"+{controller}")


def _throttle(group: Path, kind: str, limits: Limits) -> None:
    """Limit what is read from the block device below ``limits.path``: whole disks only, so a partition's disk."""
    device = _throttled_path(limits).stat().st_dev
    number = _disk_of(os.major(device), os.minor(device))
    name, line = (
        ("blkio.throttle.read_bps_device", f"{number} {limits.read_bps}")
        if kind == "v1"
        else ("io.max", f"{number} rbps={limits.read_bps}")
    )
    _hand_down(kind, "io")
    _set(group / name, line, "reads cannot be throttled")


def _throttled_path(limits: Limits) -> Path:
    assert limits.path is not None, "a throttle needs a path on the disk that is throttled"
    return limits.path


def _disk_of(major: int, minor: int) -> str:
    """major:minor of the whole disk of a block device, or of the one below an overlay's writable layer.

    Raises ForegateError where there is none: tmpfs, network, an overlay whose layers cannot be seen from here.
    """
    here = Path(f"/sys/dev/block/{major}:{minor}")
    if here.exists():
        disk = here.resolve().parent if (here / "partition").exists() else here.resolve()
        return (disk / "dev").read_text().strip()
    # A file system may number itself (btrfs, overlay, some virtual machines): the mount table names what is below.
    below = _below(major, minor)
    if below is None:
        raise ForegateError(f"reads cannot be throttled: no block device is below device {major}:{minor}")
    return _disk_of(os.major(below), os.minor(below))


def _below(major: int, minor: int) -> int | None:
    """Number of the device that the mounted file system ``major``:``minor`` lies on; None where none is to be seen."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        kind, source, options = fields[fields.index("-") + 1 :][:3]
        if fields[2] != f"{major}:{minor}":
            continue
        found = _upper_device(options) if kind == "overlay" else _block_device(Path(source))
        if found is not None and found != os.makedev(major, minor):
            return found
    return None


def _block_device(path: Path) -> int | None:
    return path.stat().st_rdev if path.is_block_device() else None


def _upper_device(options: str) -> int | None:
    """Device of an overlay's writable layer, which inside a container is mostly out of sight."""
    upper = next((Path(part[9:]) for part in options.split(",") if part.startswith("upperdir=")), None)
    return upper.stat().st_dev if upper is not None and upper.is_dir() else None


def _peak(group: Path) -> int | None:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        text = _read(group / name).strip()
        if text:
            return int(text)
    return None


def _used(group: Path) -> tuple[int, int] | None:
    """Of memory.stat: version 1 calls it rss and cache, version 2 anon and file."""
    stat = dict(line.split()[:2] for line in _read(group / "memory.stat").splitlines())
    for names in (("total_rss", "total_cache"), ("anon", "file")):
        if all(name in stat for name in names):
            return int(stat[names[0]]), int(stat[names[1]])
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
