"""Reads by io_uring: the same bytes, and an error where there are none. Which is faster is no test's business."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from foregate.checkpoint.pack import pack
from foregate.errors import ConfigError, ForegateError
from foregate.experts import read_paths
from foregate.experts.read_paths import WAYS
from foregate.native import library, uring
from foregate.types import ALIGNMENT

NBYTES = 5 * ALIGNMENT
PIECES = 9


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "experts"
    path.write_bytes(random.Random(0).randbytes(NBYTES * PIECES))
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def _read(file: int, offsets: list[int], *, places: int, chunk: int, depth: int, registered: bool = False) -> bytes:
    if library.load("uring", ["uring_read"]) is None:
        pytest.skip("the compiled parts are missing or switched off")
    memory = mmap.mmap(-1, places * NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        with memoryview(memory) as into:
            uring.read(file, offsets, NBYTES, chunk, depth, into, registered=registered)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM, errno.ENOMEM):
            pytest.skip(f"no io_uring here: {error.strerror}")
        raise
    return bytes(memory)


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize(("chunk", "depth"), [(ALIGNMENT, 1), (2 * ALIGNMENT, 3), (NBYTES, 4), (8 * NBYTES, 2)])
def test_it_brings_the_bytes_of_the_file(file: int, chunk: int, depth: int, registered: bool) -> None:
    order = [4, 0, 8, 3, 1, 7, 2, 6, 5]
    found = _read(
        file, [n * NBYTES for n in order], places=PIECES, chunk=chunk, depth=depth, registered=registered
    )  # fmt: skip
    assert found == b"".join(os.pread(file, NBYTES, n * NBYTES) for n in order)


def test_places_are_filled_again_and_again(file: int) -> None:
    found = _read(file, [n * NBYTES for n in range(PIECES)], places=2, chunk=NBYTES, depth=1)
    assert found == os.pread(file, NBYTES, 8 * NBYTES) + os.pread(file, NBYTES, 7 * NBYTES)


def test_a_read_that_comes_short_is_an_error(file: int) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        _read(file, [0, (PIECES - 1) * NBYTES + ALIGNMENT, 0], places=3, chunk=ALIGNMENT, depth=4)


def test_every_way_is_measured_in_turns(
    tmp_path: Path, tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pack(tiny("olmoe"), tmp_path / "pack")
    read_paths._main([str(tmp_path / "pack"), "--depth", "1", "4", "--rounds", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert not set(found["left_out"].values()) & {os.strerror(code) for code in (errno.EIO, errno.EFAULT)}
    points = {(point["way"], point["depth"]): point for point in found["points"]}
    assert set(points) == {(way, depth) for way in WAYS if way not in found["left_out"] for depth in (1, 4)}
    assert ("threads", 4) in points
    assert all(0 < point["least"] <= point["gb_per_s"] <= point["most"] for point in points.values())
    assert all(point["cpu_ms_per_gb"] > 0 for point in points.values())


def test_a_way_that_is_forbidden_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> tuple[float, float]:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(read_paths, "WAYS", {"threads": lambda *_: (2.0, 10.0), "io_uring": forbidden})
    found = read_paths.compare(tmp_path, 1, depths=[1, 2], chunks=[1], rounds=3)
    assert [(point.way, point.depth, point.gb_per_s) for point in found.points] == [
        ("threads", 1, 2),
        ("threads", 2, 2),
    ]
    assert found.left_out == {"io_uring": "Cannot allocate memory: more memory must be lockable (ulimit -l)"}


@pytest.mark.parametrize(("chunk", "depth"), [(0, 1), (NBYTES, 0)])
def test_impossible_numbers_are_refused(file: int, chunk: int, depth: int) -> None:
    with pytest.raises(ConfigError, match="are impossible"):
        _read(file, [0], places=1, chunk=chunk, depth=depth)


def test_a_model_that_is_not_packed_is_refused_in_one_line() -> None:
    with pytest.raises(ForegateError, match="reference is not packed"):
        read_paths._main(["reference"])


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [("rounds", 0, "--rounds 0"), ("depths", [2, 0], "--depth 0"), ("chunks", [-1], "--chunk -1")],
)
def test_a_number_that_reads_nothing_is_refused(tmp_path: Path, name: str, value: Any, told: str) -> None:
    given: dict[str, Any] = {"depths": [1], "chunks": [1], "rounds": 1, name: value}
    with pytest.raises(ConfigError, match=f"{told}: must be at least 1"):
        read_paths.compare(tmp_path, 1, **given)
