"""What surrounds a rival: the read-ahead that is put back, the emptied page cache, the limit it finds, its figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foregate.bench.rivals.environment import RIVALS, SOURCES
from foregate.bench.rivals.memory_limit import memory_limit
from foregate.bench.rivals.outcome import Tokens, measure, read_bytes, read_tokens
from foregate.bench.rivals.pagecache import cached_bytes, drop, fill
from foregate.bench.rivals.readahead import read_ahead, setting_of
from foregate.errors import ConfigError, ForegateError

HOLD = """
import sys, time
from pathlib import Path
from foregate.bench.rivals.readahead import read_ahead
with read_ahead(Path(sys.argv[1]), 128, sys=Path(sys.argv[2]), state=Path(sys.argv[3])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A /sys in which the device under ``tmp_path`` is partition 1 of a disk with 8192 KiB of read-ahead."""
    root = tmp_path / "sys"
    (root / "devices" / "vda" / "queue").mkdir(parents=True)
    (root / "devices" / "vda" / "vda1").mkdir()
    (root / "devices" / "vda" / "queue" / "read_ahead_kb").write_text("8192\n")
    device = tmp_path.stat().st_dev
    links = root / "dev" / "block"
    links.mkdir(parents=True)
    (links / f"{os.major(device)}:{os.minor(device)}").symlink_to(root / "devices" / "vda" / "vda1")
    return root


def value(disk: Path) -> int:
    return int((disk / "devices" / "vda" / "queue" / "read_ahead_kb").read_text())


def held(disk: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """A process that holds the setting."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), str(disk), str(tmp_path / "state")]
    there = {**os.environ, "PYTHONPATH": str(SOURCES)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=there)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def wait_for(disk: Path, wanted: int) -> bool:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if value(disk) == wanted:
            return True
        time.sleep(0.02)
    return False


def test_read_ahead_is_set_inside_and_put_back_after_an_error(disk: Path, tmp_path: Path) -> None:
    inside = []

    def fails() -> None:
        with read_ahead(tmp_path, 128, sys=disk, state=tmp_path / "state") as before:
            inside.extend([before, value(disk)])
            raise KeyError("the run failed")

    with pytest.raises(KeyError):
        fails()
    assert inside == [8192, 128]
    assert value(disk) == 8192
    assert list((tmp_path / "state").iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_read_ahead_is_put_back_when_its_holder_is_killed(disk: Path, tmp_path: Path, how: signal.Signals) -> None:
    process = held(disk, tmp_path)
    assert value(disk) == 128
    process.send_signal(how)
    process.communicate()
    assert wait_for(disk, 8192)


def test_a_second_run_does_not_take_the_first_ones_setting_for_the_old_value(disk: Path, tmp_path: Path) -> None:
    process = held(disk, tmp_path)
    try:
        with (
            pytest.raises(ForegateError, match=f"held by process {process.pid}"),
            read_ahead(tmp_path, 64, sys=disk, state=tmp_path / "state"),
        ):
            pytest.fail("taken twice")
        assert value(disk) == 128
    finally:
        process.kill()
        process.communicate()
    assert wait_for(disk, 8192)


def test_what_a_dead_run_left_is_put_back_at_the_next_start(disk: Path, tmp_path: Path) -> None:
    setting = setting_of(tmp_path, sys=disk)
    setting.write_text("128")
    (tmp_path / "state").mkdir()
    left = {"setting": str(setting), "before": 4096, "pid": os.getpid(), "started": "0"}  # an id used again since
    (tmp_path / "state" / "read-ahead-vda.json").write_text(json.dumps(left))
    with read_ahead(tmp_path, 256, sys=disk, state=tmp_path / "state") as before:
        assert before == 4096
    assert value(disk) == 4096


def test_a_file_system_without_a_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ForegateError, match="no block device"):
        setting_of(tmp_path, sys=tmp_path)


def test_without_root_one_line_says_so(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ForegateError, match="needs root"),
        read_ahead(tmp_path, 128, sys=disk, state=tmp_path / "file" / "state"),
    ):
        pytest.fail("it was allowed")
    assert value(disk) == 8192


def test_a_dropped_file_is_cold_and_a_filled_one_is_warm(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(1 << 20))
    fill([file])
    assert cached_bytes(file) == 1 << 20
    drop([file])
    if cached_bytes(file):
        pytest.skip("this file system keeps its files in memory")
    fill([file])
    assert cached_bytes(file) == 1 << 20


def test_the_limit_is_the_tightest_of_the_groups_above(tmp_path: Path) -> None:
    inner = tmp_path / "memory" / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (inner.parent / "memory.limit_in_bytes").write_text("3000\n")
    unified = tmp_path / "unit"
    unified.mkdir()
    (unified / "memory.max").write_text("max\n")
    assert memory_limit("4:cpu,memory:/outer/inner\n0::/unit\n", tmp_path) == 3000
    (unified / "memory.max").write_text("2000\n")
    assert memory_limit("4:cpu,memory:/outer/inner\n0::/unit\n", tmp_path) == 2000
    assert memory_limit("0::/elsewhere\n", tmp_path) is None


def test_figures_belong_to_their_phase(tmp_path: Path) -> None:
    """Loading must not count as time to first token, nor the prompt as decoding."""
    fed: list[list[int]] = []

    def load() -> object:
        time.sleep(0.05)
        return feed

    def feed(tokens: list[int]) -> int:
        fed.append(tokens)
        time.sleep(0.02 if len(tokens) > 1 else 0.005)
        return tokens[-1] + 1

    said = measure(Tokens([1, 2], [7, 8]), load, rival="r", version="1", settings={})  # type: ignore[arg-type]
    assert fed == [[1, 2], [7], [8]]
    assert said.argmax == [3, 8, 9]
    assert said.load_s >= 0.05
    assert said.ttft_s >= 0.02
    assert len(said.tpot_ms) == 2
    assert min(said.tpot_ms) >= 5
    assert said.peak_rss_bytes > 1 << 20
    assert json.loads(said.line())["rival"] == "r"


def test_bytes_read_are_those_from_the_disk(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(4 << 20))
    drop([file])
    if cached_bytes(file):
        pytest.skip("this file system keeps its files in memory")
    before = read_bytes()
    fill([file])
    assert read_bytes() - before >= 4 << 20
    before = read_bytes()
    fill([file])
    assert read_bytes() - before < 1 << 20


@pytest.mark.parametrize("content", ["{}", "[", '{"prompt": [1], "stream": ["a"]}', '{"prompt": [], "stream": []}'])
def test_a_file_that_holds_no_tokens_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokens.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokens\.json"):
        read_tokens(tmp_path / "tokens.json")


def test_a_rival_that_is_not_installed_says_where_it_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREGATE_RIVALS_PYTHON", sys.executable)
    said = RIVALS.missing("no_such_rival")
    assert said is not None
    assert "No module named 'no_such_rival'" in said
    assert sys.executable in said
