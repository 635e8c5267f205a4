"""Whether io_uring would bring experts sooner than our threads: ``python -m foregate.experts.read_paths PACK``.

The engine's own reader (its submissions and waits for every expert included) and io_uring (one compiled loop), plain
and with buffers and file registered, read the same experts in the same chunks, as many at a time, in turns. What it
gave on one disk is in dev/LOG.md.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import track
from rich.table import Table

from foregate.checkpoint.locate import locate
from foregate.checkpoint.manifest import EXPERTS_FILE
from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.readplan import CHUNK_BYTES
from foregate.errors import ConfigError, ForegateError
from foregate.experts.diskspeed import DEPTHS, disk_speed, measuring_pool, scattered
from foregate.native import uring

POINT_BYTES = 512 << 20
"""Read for one figure, or MOST_READS experts where those are less."""
MOST_READS = 256


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians over the rounds, with the least and the most. ``cpu_ms_per_gb``: processor time, kernel included."""

    way: str
    chunk_bytes: int
    depth: int
    gb_per_s: float
    least: float
    most: float
    cpu_ms_per_gb: float


Point = tuple[int, int]
"""Bytes of a chunk, chunks at a time."""
Way = Callable[[Path, int, Point], tuple[float, float]]
"""(file, bytes of an expert, point) → (GB/s, processor ms per GB)."""


def _point(nbytes: int) -> int:
    return min(POINT_BYTES, MOST_READS * nbytes)


def by_threads(file: Path, nbytes: int, point: Point) -> tuple[float, float]:
    """The engine's reader, a thread for each chunk at a time."""
    chunk, depth = point
    (found,) = disk_speed(
        file, nbytes, depths=[depth], chunks=[chunk], point_bytes=_point(nbytes), reader="native"
    )  # fmt: skip
    return found.gb_per_s, found.cpu_ms_per_gb


def by_uring(file: Path, nbytes: int, point: Point, *, registered: bool = False) -> tuple[float, float]:
    """io_uring from one thread, past the page cache like the other. Raises OSError where the kernel refuses it."""
    chunk, depth = point
    pieces = file.stat().st_size // nbytes
    offsets = [number * nbytes for number in islice(scattered(pieces), max(1, _point(nbytes) // nbytes))]
    pool = measuring_pool(nbytes)
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        took, cpu = uring.read(descriptor, offsets, nbytes, chunk, depth, pool.whole(), registered=registered)
    finally:
        os.close(descriptor)
    gigabytes = len(offsets) * nbytes / 1e9
    return gigabytes / took, cpu * 1e3 / gigabytes


def by_registered(file: Path, nbytes: int, point: Point) -> tuple[float, float]:
    """io_uring with buffers and file told to the kernel once."""
    return by_uring(file, nbytes, point, registered=True)


WAYS: dict[str, Way] = {"threads": by_threads, "io_uring": by_uring, "io_uring, registered": by_registered}


@dataclass(frozen=True, slots=True)
class Comparison:
    """``left_out``: way → why it could not read here."""

    expert_bytes: int
    rounds: int
    points: Sequence[Measured]
    left_out: Mapping[str, str]


def compare(
    file: Path, nbytes: int, *, depths: Sequence[int], chunks: Sequence[int], rounds: int, quiet: bool = True
) -> Comparison:
    """Every way at every point, ``rounds`` times in turns, each round beginning with another way.

    Raises ForegateError where the file cannot be read at all, ConfigError where nothing was compiled or a number is
    not positive.
    """
    for name, value in (("rounds", rounds), *(("depth", depth) for depth in depths), *(("chunk", n) for n in chunks)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: must be at least 1")
    turns = [
        (point, list(WAYS)[(number + index) % len(WAYS)])
        for number, point, index in product(range(rounds), list(product(chunks, depths)), range(len(WAYS)))
    ]
    found: dict[tuple[Point, str], list[tuple[float, float]]] = {}
    left_out: dict[str, str] = {}
    for point, way in track(turns, "reading", console=Console(stderr=True), disable=quiet, transient=True):
        if way not in left_out:
            try:
                found.setdefault((point, way), []).append(WAYS[way](file, nbytes, point))
            except OSError as error:
                left_out[way] = _why(error)
    points = [_measured(way, point, runs) for (point, way), runs in sorted(found.items()) if runs]
    return Comparison(nbytes, rounds, points, left_out)


def _measured(way: str, point: Point, runs: Sequence[tuple[float, float]]) -> Measured:
    speeds = [speed for speed, _ in runs]
    return Measured(way, *point, median(speeds), min(speeds), max(speeds), median(cpu for _, cpu in runs))


def _why(error: OSError) -> str:
    hints = {errno.ENOMEM: "more memory must be lockable (ulimit -l)", errno.EINVAL: "the disk must allow O_DIRECT"}
    hint = hints.get(error.errno or 0)
    return f"{error.strerror}" + (f": {hint}" if hint else "")


def _table(found: Sequence[Measured]) -> Table:
    table = Table("chunk", "at a time", "by", "GB/s", "range", "processor ms a GB")
    for point in found:
        chunk, bounds = f"{point.chunk_bytes / 2**20:g} MiB", f"{point.least:.2f}-{point.most:.2f}"
        figures = f"{point.gb_per_s:.2f}", bounds, f"{point.cpu_ms_per_gb:.0f}"
        table.add_row(chunk, str(point.depth), point.way, *figures)
    return table


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m foregate.experts.read_paths", description=__doc__)
    parser.add_argument("pack", help="a packed model, whose experts are read")
    parser.add_argument("--depth", type=int, nargs="+", default=list(DEPTHS), help="chunks at a time")
    parser.add_argument("--chunk", type=int, nargs="+", default=[CHUNK_BYTES], help="bytes of one read")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    given = parser.parse_args(arguments)
    checkpoint = open_checkpoint(locate(given.pack))
    if not checkpoint.packed:
        raise ForegateError(f"{given.pack} is not packed: see foregate pack")
    file, nbytes = checkpoint.directory / EXPERTS_FILE, checkpoint.spec.expert_slot_bytes
    found = compare(file, nbytes, depths=given.depth, chunks=given.chunk, rounds=given.rounds, quiet=given.json)
    if given.json:
        print(json.dumps(asdict(found)))
    else:
        Console().print(_table(found.points))
        for way, why in found.left_out.items():
            Console().print(f"{way}: left out: {why}")


if __name__ == "__main__":
    try:
        _main()
    except ForegateError as error:
        sys.exit(f"error: {error}")
