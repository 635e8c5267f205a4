"""Interrupted packs: nothing looks finished, the next run goes on, and the result is the same to the byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foregate.checkpoint import packwriter
from foregate.checkpoint.manifest import EXPERTS_FILE, is_pack
from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.pack import pack
from foregate.checkpoint.verify import verify
from foregate.errors import CheckpointError, PackError
from test_checkpoint_support import edit_tensors, tiny

EXPERTS = 64


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(packwriter, "SYNC_BYTES", 3 * 12288)
    return tiny(tmp_path / "source")


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """An uninterrupted pack."""
    pack(source, tmp_path / "whole")
    return contents(tmp_path / "whole")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def stop_at(share: float) -> object:
    def progress(done: int, total: int) -> None:
        if done >= share * total:
            raise KeyboardInterrupt

    return progress


def interrupted(source: Path, out: Path, share: float) -> Path:
    """Start packing and stop; returns the temporary directory."""
    with pytest.raises(KeyboardInterrupt):
        pack(source, out, stop_at(share))  # type: ignore[arg-type]
    temporary = out.parent / f".{out.name}.partial"
    assert not out.exists()
    assert not is_pack(temporary)
    assert not (temporary / EXPERTS_FILE).exists()
    return temporary


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_interrupted_and_resumed_is_the_same(
    share: float, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    temporary = interrupted(source, tmp_path / "out", share)
    result = pack(source, tmp_path / "out")
    assert result.resumed == 0 if share < 0.2 else 0 < result.resumed < EXPERTS
    assert contents(tmp_path / "out") == whole
    assert not temporary.exists()


def test_interrupted_many_times(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    for share in (0.3, 0.5, 0.7, 0.9):
        interrupted(source, tmp_path / "out", share)
    assert pack(source, tmp_path / "out").resumed > EXPERTS // 2
    assert contents(tmp_path / "out") == whole


def test_only_what_is_missing_is_read_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(source, tmp_path / "out", 0.6)
    assembled = []
    original = packwriter.PackWriter._assemble

    def counting(self: packwriter.PackWriter, *arguments: object) -> bytearray:
        assembled.append(arguments)
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(packwriter.PackWriter, "_assemble", counting)
    assert len(assembled) + pack(source, tmp_path / "out").resumed < EXPERTS
    assert 0 < len(assembled) < EXPERTS


def test_killed_for_real(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """SIGKILL in the middle of an expert's write: no handler runs, nothing is flushed."""
    script = f"""
import os, signal
from foregate.checkpoint import packwriter
from foregate.checkpoint.pack import pack
packwriter.SYNC_BYTES = 3 * 12288
original, calls = packwriter._write_all, []
def write_all(fd, content, offset):
    calls.append(offset)
    if len(calls) == 30:
        os.pwrite(fd, bytes(content)[:5000], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    original(fd, content, offset)
packwriter._write_all = write_all
pack({str(source)!r}, {str(tmp_path / "out")!r})
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    result = pack(source, tmp_path / "out")
    assert 20 < result.resumed < 30
    assert contents(tmp_path / "out") == whole
    verify(tmp_path / "out", source)


def test_half_a_line_in_the_journal(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    journal = interrupted(source, tmp_path / "out", 0.5) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-10])
    assert pack(source, tmp_path / "out").resumed > 0
    assert contents(tmp_path / "out") == whole


def test_junk_in_the_journal_starts_over(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    journal = interrupted(source, tmp_path / "out", 0.5) / "journal.jsonl"
    journal.write_bytes(b"junk\n" + journal.read_bytes())
    assert pack(source, tmp_path / "out").resumed == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("keep", [None, 5000])
def test_journal_without_the_bytes_starts_over(
    keep: int | None, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    partial = interrupted(source, tmp_path / "out", 0.5) / f"{EXPERTS_FILE}.partial"
    if keep is None:
        partial.unlink()
    else:
        os.truncate(partial, keep)
    assert pack(source, tmp_path / "out").resumed == 0
    assert contents(tmp_path / "out") == whole


def test_source_that_changed_meanwhile_starts_over(source: Path, tmp_path: Path) -> None:
    """Same names and shapes, other weights."""
    interrupted(source, tmp_path / "out", 0.5)
    edit_tensors(source, lambda tensors: {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    assert pack(source, tmp_path / "out").resumed == 0
    verify(tmp_path / "out", source)


def test_another_model_to_the_same_place_starts_over(source: Path, tmp_path: Path) -> None:
    temporary = interrupted(source, tmp_path / "out", 0.5)
    (temporary / "leftover").mkdir()
    pack(tiny(tmp_path / "other", "mixtral"), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").spec.model_type == "mixtral"
    assert not (tmp_path / "out" / "leftover").exists()
    verify(tmp_path / "out", tmp_path / "other")


def test_killed_before_the_last_rename(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "out")
    assert pack(source, tmp_path / "out").resumed == EXPERTS
    assert contents(tmp_path / "out") == whole


def test_killed_after_the_last_rename(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(directory: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("foregate.checkpoint.pack._sync_directory", killed)
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "out")
    assert pack(source, tmp_path / "out").finished_before
    assert contents(tmp_path / "out") == whole


def test_two_packs_to_one_place(source: Path, tmp_path: Path) -> None:
    def second(done: int, total: int) -> None:
        if done == total:
            with pytest.raises(PackError, match="another process is writing this pack"):
                pack(source, tmp_path / "out")

    pack(source, tmp_path / "out", second)
    verify(tmp_path / "out", source)


def test_the_lock_is_held_until_the_pack_has_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = Path.replace, []

    def second(self: Path, target: Path) -> Path:
        with pytest.raises(PackError, match="another process is writing this pack") as caught:
            pack(source, tmp_path / "out")
        refused.append(caught)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", second)
    pack(source, tmp_path / "out")
    assert len(refused) == 1
    verify(tmp_path / "out", source)


def test_a_pack_that_another_process_has_just_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had its name between our look at the output and our lock."""
    pack(source, tmp_path / "out")
    from foregate.checkpoint import pack as module

    real, calls = module._finished, []

    def late(*arguments: object) -> bool:
        calls.append(arguments)
        return len(calls) > 1 and real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_finished", late)
    assert pack(source, tmp_path / "out").finished_before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_source_that_breaks_off_meanwhile(source: Path, tmp_path: Path) -> None:
    weights = source / "model.safetensors"

    def truncate(done: int, total: int) -> None:
        os.truncate(weights, 500_000)

    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated: expected \d+ bytes, found 500000"):
        pack(source, tmp_path / "out", truncate)
    assert not (tmp_path / "out").exists()
