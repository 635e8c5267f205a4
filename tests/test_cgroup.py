"""The budget under the kernel's eyes: a hard memory limit around a whole run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from foregate.bench.rivals.pagecache import drop
from foregate.errors import ForegateError
from foregate.testing.cgroup import KINDS, ROOT, Limits, _disk_of, _prove_v2, available, confined, run_limited

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


MUST = os.environ.get("FOREGATE_MUST", "").split(",")
"""What scripts/cgroup-inside wants to work, of KINDS and "throttle": skipping it is a failure."""


def skip(what: str, why: object) -> NoReturn:
    assert what not in MUST, f"{what}: {why}"
    pytest.skip(str(why))


@pytest.fixture(params=[kind for kind in KINDS if kind != "auto"])
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind that really works here. ``make cgroup-vm`` has a machine for those that do not."""
    found = str(request.param)
    try:
        with confined(Limits(1 << 30), found):
            return found
    except ForegateError as error:
        skip(found, error)


def test_what_takes_more_than_its_limit_is_killed(kind: str) -> None:
    take = [sys.executable, "-S", "-c", f"print(len(b'x' * {100 * MB}))"]
    enough, too_little = run_limited(take, 200 * MB, kind), run_limited(take, 50 * MB, kind)
    assert (enough.returncode, enough.stdout, too_little.returncode) == (0, f"{100 * MB}\n", -signal.SIGKILL)
    if kind == "systemd-run":
        assert enough.peak_bytes is None
    elif enough.peak_bytes is None:
        assert kind == "v2", "version 1 tells it always, version 2 since Linux 5.19"
    else:
        assert too_little.peak_bytes is not None
        assert 40 * MB <= too_little.peak_bytes <= 50 * MB < 100 * MB <= enough.peak_bytes <= 200 * MB


@pytest.mark.parametrize("how", ["direct", "mapped"])
def test_a_throttle_slows_our_direct_reads_and_page_faults_alike(tmp_path: Path, how: str, kind: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(16 << 20))
    drop([file])
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
        with confined(Limits(1 << 30, 20 * MB, file), kind) as box:
            command = box.command([sys.executable, "-c", READ, how, str(file)])
            done = subprocess.run(command, preexec_fn=box.join, capture_output=True, text=True, check=True)
    except (ForegateError, OSError) as error:
        skip("throttle" if kind in MUST else f"throttle of {kind}", f"reads cannot be throttled here: {error}")
    # 0.84 s at the rate asked for; the first slice of time may carry more
    assert float(done.stdout) > 0.5


@pytest.fixture
def obeying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A group whose files say what a stand-in for systemd-run has done, which runs its command and does nothing."""
    script = tmp_path / "systemd-run"
    script.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("foregate.testing.cgroup._group_of", lambda pid, controller: tmp_path)
    for name, text in {"memory.max": 1 << 30, "memory.swap.max": 0, "io.max": f"8:0 rbps={MB} wbps=max"}.items():
        (tmp_path / name).write_text(f"{text}\n")
    return tmp_path


def test_a_systemd_that_obeys_is_believed(obeying: Path) -> None:
    with confined(Limits(1 << 30, MB, obeying), "systemd-run") as box:
        assert box.command(["true"])[0] == "systemd-run"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("memory.max", "max", "cannot limit memory"),
        ("memory.max", f"{2 << 30}", "cannot limit memory"),
        ("io.max", "", "reads cannot be throttled"),
        ("io.max", f"8:0 rbps={10 * MB} wbps=max", "reads cannot be throttled"),
    ],
)
def test_what_systemd_passes_by_is_told(obeying: Path, name: str, text: str, message: str) -> None:
    (obeying / name).write_text(f"{text}\n")
    with pytest.raises(ForegateError, match=message), confined(Limits(1 << 30, MB, obeying), "systemd-run"):
        pytest.fail("ran without what was asked for")


def test_limits_that_were_taken_away_are_told(obeying: Path) -> None:
    limits = Limits(1 << 30, MB, obeying)
    _prove_v2(obeying, limits)
    (obeying / "io.max").unlink()
    _prove_v2(obeying, Limits(1 << 30))
    with pytest.raises(ForegateError, match="the throttle was lifted while it ran"):
        _prove_v2(obeying, limits)
    (obeying / "memory.max").unlink()
    with pytest.raises(ForegateError, match="the memory limit was lifted while it ran"):
        _prove_v2(obeying, limits)


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


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_directory_that_is_no_cgroup_limits_nothing_and_says_so(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr("foregate.testing.cgroup.ROOT", tmp_path)
    with (
        pytest.raises(ForegateError, match=f"cgroup {version} cannot limit memory here"),
        confined(Limits(1 << 30), version),
    ):
        pytest.fail("ran without a limit")
    assert not [*tmp_path.glob("foregate-*"), *tmp_path.glob("memory/*")]
