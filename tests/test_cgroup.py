"""The budget under the kernel's eyes: a hard memory limit around a whole run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from foregate.bench.rivals.pagecache import drop
from foregate.errors import ForegateError
from foregate.testing.cgroup import ROOT, Limits, _disk_of, available, confined

MB = 10**6
READ = """
import mmap, os, sys, time
how, name = sys.argv[1:]
began = time.perf_counter()
if how == "direct":
    file, page = os.open(name, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 1 << 20)
    while os.readv(file, [page]): pass
else:
    view = mmap.mmap(os.open(name, os.O_RDONLY), 0, prot=mmap.PROT_READ)
    sum(view[::4096])
print(time.perf_counter() - began)
"""


def _throttles(path: Path) -> bool:
    try:
        with confined(Limits(1 << 30, 100 * MB, path)):
            os.close(os.open(path / "probe", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except (ForegateError, OSError):
        return False
    return True


@pytest.mark.parametrize("how", ["direct", "mapped"])
def test_a_throttle_slows_our_direct_reads_and_page_faults_alike(tmp_path: Path, how: str) -> None:
    if not _throttles(tmp_path):
        pytest.skip("reads cannot be throttled here: no cgroup for it, or no block device below")
    file = tmp_path / "file"
    file.write_bytes(os.urandom(16 << 20))
    drop([file])
    with confined(Limits(1 << 30, 20 * MB, file)) as box:
        command = box.command([sys.executable, "-c", READ, how, str(file)])
        done = subprocess.run(command, preexec_fn=box.join, capture_output=True, text=True, check=True)
    # 0.84 s at the rate asked for; the first slice of time may carry more
    assert float(done.stdout) > 0.5


@pytest.mark.skipif(available() not in ("v1", "v2"), reason="no cgroup can be made here")
def test_what_a_killed_run_left_is_removed_by_the_next() -> None:
    root = ROOT / "memory" if available() == "v1" else ROOT
    left, own = root / f"foregate-{2**30}-0", root / f"foregate-{os.getpid()}-own"
    left.mkdir()
    own.mkdir()
    try:
        with confined(Limits(1 << 30)):
            assert not left.exists()
            assert own.exists()
    finally:
        own.rmdir()


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """A mounted overlay whose layers lie in ``tmp_path``."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(tmp_path / "merged")]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no overlay can be mounted here")
    try:
        yield tmp_path / "merged"
    finally:
        subprocess.run(["umount", str(tmp_path / "merged")], check=True)


def test_the_disk_below_an_overlay_is_that_of_its_writable_layer(overlay: Path) -> None:
    device, below = overlay.stat().st_dev, overlay.parent.stat().st_dev
    assert device != below
    try:
        expected = _disk_of(os.major(below), os.minor(below))
    except ForegateError:
        pytest.skip("no block device below the temporary directory")
    assert _disk_of(os.major(device), os.minor(device)) == expected


def test_where_no_disk_is_below_one_line_says_so() -> None:
    device = Path("/proc").stat().st_dev
    with pytest.raises(ForegateError, match=f"no block device is below device {os.major(device)}:{os.minor(device)}"):
        _disk_of(os.major(device), os.minor(device))


@pytest.mark.slow
@pytest.mark.skipif(available() is None, reason="no memory limit can be set here: no writable cgroup, no systemd-run")
@pytest.mark.parametrize("packed", [False, True])
def test_a_prompt_of_two_thousand_tokens_stays_inside_budget_dense_and_overhead(tmp_path: Path, packed: bool) -> None:
    command = [
        sys.executable, "-m", "foregate.testing.cgroup_run", "--dir", str(tmp_path / "model"), "--gigabytes", "0.6",
        "--prompt-tokens", "2100", "--tokens", "4", *(["--packed"] if packed else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["prompt_tokens"] >= 2100
    assert found["limit_bytes"] == found["dense_bytes"] + found["budget_bytes"] + found["overhead_bytes"]
    assert found["budget_bytes"] * 4 <= found["experts_bytes"]
    assert found["resident_bytes_peak"] <= found["budget_bytes"]


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_a_directory_that_is_no_cgroup_limits_nothing_and_says_so(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr("foregate.testing.cgroup.ROOT", tmp_path)
    with pytest.raises(ForegateError, match=f"cgroup {kind} cannot limit memory here"), confined(Limits(1 << 30), kind):
        pytest.fail("ran without a limit")
    assert not [*tmp_path.glob("foregate-*"), *tmp_path.glob("memory/*")]
