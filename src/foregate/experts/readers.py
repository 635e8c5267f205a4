"""Who reads experts, and with how many threads: as told, as measured on this disk before, or measured now."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from foregate.config import DEFAULT_READERS
from foregate.errors import ForegateError
from foregate.experts.diskspeed import drive, scattered
from foregate.experts.native_transfer import NativeTransfer, available
from foregate.experts.slots import SlotPool
from foregate.experts.store import PackedStore
from foregate.experts.sync_transfer import SyncTransfer
from foregate.experts.transfer import ThreadedTransfer
from foregate.interfaces import ExpertStore
from foregate.types import ExpertKey

AnyTransfer = NativeTransfer | ThreadedTransfer | SyncTransfer

CANDIDATES = (2, 4, 8)
"""Never one: it may read as fast alone, but the disk rests while it verifies and while both cores compute, and a needed
expert waits behind its piece (10-15 % of a token, at 50 and 75 % twice the time to the first; dev/LOG.md)."""
ROUNDS = 2
ROUND_S = 0.015
"""Seconds for each candidate and round, after which what is in flight still arrives: 0.3 s in all at 1.5 GB/s."""

SMALLEST_BYTES = 64 << 20
"""Of a pack: less is read before a measurement says anything."""

GOOD_ENOUGH = 0.92
"""Share of the best speed. Threads that gain less cost the model more processor time than they save."""

_BUSY_BYTES = 32 << 20
"""In flight during a measurement: enough chunks for the most threads."""

logger = logging.getLogger("foregate")


@dataclass(frozen=True, slots=True)
class Readers:
    """The reader threads of a run. ``chosen``: given, measured, remembered or default (then ``why``)."""

    threads: int
    chosen: str
    why: str = ""
    gb_per_s: dict[int, float] = field(default_factory=dict)
    native: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def open_transfer(store: ExpertStore, pool: SlotPool, *, threads: int, timeout_s: float) -> AnyTransfer:
    """The compiled transfer for a pack; the Python one for anything else, or where nothing was compiled.

    With no threads at all, each expert is read when it is waited for: what a naive offloader does.
    """
    if not threads:
        return SyncTransfer(store, pool, lazy=True)
    if is_native(store):
        assert isinstance(store, PackedStore)
        return NativeTransfer(store, pool, threads=threads, timeout_s=timeout_s)
    return ThreadedTransfer(store, pool, threads=threads, timeout_s=timeout_s)


def is_native(store: ExpertStore) -> bool:
    """Whether the compiled transfer can read ``store``. A wrapped store must see every read, so it cannot."""
    return isinstance(store, PackedStore) and available()


def choose(wanted: int | None, store: ExpertStore, pool: SlotPool, experts: Sequence[int]) -> Readers:
    """Reader threads for ``store``: ``wanted``, or (None) the fewest that read at nearly full speed.

    ``experts`` per MoE layer. A measurement reads into ``pool``, which must be empty, and is remembered for the file
    system and expert size in the user's cache directory.
    """
    native = is_native(store)
    if wanted is not None:
        return Readers(wanted, "given", native=native)
    if not isinstance(store, PackedStore):
        return Readers(DEFAULT_READERS, "default", "not a pack", native=native)
    if Path(store.path).stat().st_size < SMALLEST_BYTES:
        return Readers(DEFAULT_READERS, "default", "the pack is too small to measure", native=native)
    name = _name(store, native)
    speeds = _remembered(name)
    if speeds:
        return Readers(fewest(speeds), "remembered", gb_per_s=speeds, native=native)
    try:
        speeds = _measure(store, pool, experts)
    except ForegateError as error:
        return Readers(DEFAULT_READERS, "default", f"the measurement failed: {error}", native=native)
    _remember(name, speeds)
    return Readers(fewest(speeds), "measured", gb_per_s=speeds, native=native)


def fewest(speeds: Mapping[int, float]) -> int:
    """Of CANDIDATES, the fewest threads that read at nearly full speed; ``speeds`` by number of threads."""
    tried = {threads: speeds[threads] for threads in CANDIDATES}
    return min(threads for threads, speed in tried.items() if speed >= GOOD_ENOUGH * max(tried.values()))


def _measure(store: PackedStore, pool: SlotPool, experts: Sequence[int]) -> dict[int, float]:
    """GB/s by number of threads, of the experts themselves, verified as in a run."""
    everyone = [ExpertKey(layer, expert) for layer, count in enumerate(experts) for expert in range(count)]
    keys = (everyone[index] for index in scattered(len(everyone)))
    busy = min(max(2, _BUSY_BYTES // pool.slot_bytes), 32, pool.slots)
    for slot in range(busy):
        pool.view(slot)[:] = bytes(pool.slot_bytes)  # the first touch of a page is not the disk's time
    found: dict[int, list[float]] = {threads: [] for threads in CANDIDATES}
    for _ in range(ROUNDS):
        for threads in CANDIDATES:
            with open_transfer(store, pool, threads=threads, timeout_s=10.0) as transfer:
                began = perf_counter()
                drive(transfer, keys, busy, len(everyone), ROUND_S)
                found[threads].append(transfer.stats().demand_bytes / (perf_counter() - began) / 1e9)
    return {threads: round(median(speeds), 3) for threads, speeds in found.items()}


# What was measured before


def cache_file() -> Path:
    """Where measurements are remembered: the XDG cache directory."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "foregate" / "readers.json"


def _name(store: PackedStore, native: bool) -> str:
    """Of what the speed depends on: file system, expert size, processors, reader."""
    device, volume = Path(store.path).stat().st_dev, os.statvfs(store.path)
    disk = f"{device}:{volume.f_blocks * volume.f_frsize}"
    return f"{disk} {store.slot_bytes} {os.cpu_count()} {'native' if native else 'python'}"


def _remembered(name: str) -> dict[int, float]:
    with suppress(OSError, ValueError, LookupError, AttributeError, TypeError):
        speeds = {int(threads): float(speed) for threads, speed in json.loads(cache_file().read_text())[name].items()}
        if set(speeds) == set(CANDIDATES) and min(speeds.values()) > 0:
            return speeds
    return {}


def _remember(name: str, speeds: dict[int, float]) -> None:
    """Losing it costs the next start a quarter of a second, so no failure matters."""
    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        known = _all_known(file)
        beside = file.with_name(f"{file.name}.{os.getpid()}")
        beside.write_text(json.dumps({**known, name: speeds}, indent=1))
        beside.replace(file)
    except OSError as error:
        logger.info("%s: measurement not remembered: %s", file, error.strerror)


def _all_known(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        known = json.loads(file.read_text())
        if isinstance(known, dict):
            return known
    return {}
