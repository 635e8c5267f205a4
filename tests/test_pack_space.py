"""Disks that are full or closed: one line, and nothing half-written is left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foregate.checkpoint.pack import pack
from foregate.checkpoint.verify import verify
from foregate.errors import PackError
from test_checkpoint_support import tiny


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny(tmp_path / "source")


def refusal(source: Path, out: Path) -> str:
    with pytest.raises(PackError) as caught:
        pack(source, out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_little_space_is_seen_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=3, f_frsize=4096))
    message = refusal(source, tmp_path / "out")
    assert "no space left" in message
    assert "12288 are free" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate"])
def test_full_disk_leaves_nothing(
    code: int, call: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(os, call), []

    def full(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > (10 if call == "pwrite" else 0):
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        assert refusal(source, tmp_path / "out") == (
            f"{tmp_path}/out: no space left on the device ({os.strerror(code)}); nothing was kept"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    pack(source, tmp_path / "out")
    verify(tmp_path / "out", source)


def test_a_limit_on_the_size_of_files_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """``ulimit -f``, in a process of its own: the limit cannot be raised again."""
    script = f"""
import resource
from foregate.checkpoint.pack import pack
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
pack({str(source)!r}, {str(tmp_path / "out")!r})
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("(ulimit -f, or the file system) (File too large); nothing was kept\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_other_errors_say_that_running_again_resumes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, []

    def broken(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > 10:
            raise OSError(errno.EIO, "Input/output error")
        return int(real(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr("foregate.checkpoint.packwriter.SYNC_BYTES", 1)
        patch.setattr(os, "pwrite", broken)
        assert refusal(source, tmp_path / "out") == (
            f"{tmp_path}/out: cannot be written: Input/output error; "
            f"running it again resumes (what is there is in {tmp_path}/.out.partial)"
        )
    assert pack(source, tmp_path / "out").resumed > 0
    verify(tmp_path / "out", source)


@pytest.mark.parametrize("length", [250, 300])
def test_names_that_are_too_long(length: int, source: Path, tmp_path: Path) -> None:
    """Of the output, and of the hidden directory beside it."""
    assert refusal(source, tmp_path / ("x" * length)).endswith(": cannot be written: File name too long")


def test_writes_that_are_cut_short_are_continued(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, content, offset: real(fd, content[:1000], offset))
        pack(source, tmp_path / "out")
    verify(tmp_path / "out", source)


@pytest.mark.parametrize("out", ["/proc/pack", "/dev/null/pack", "/proc/self/status/pack"])
def test_places_where_nobody_can_write(source: Path, out: str) -> None:
    assert refusal(source, Path(out)).startswith(f"{Path(out).resolve()}: cannot be written: ")


def test_directory_without_permission(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refused)
        assert refusal(source, tmp_path / "out") == f"{tmp_path}/out: cannot be written: Permission denied"
