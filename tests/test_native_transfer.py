"""The compiled transfer on real files: digests, real faults, hangs, interrupts, and when the engine takes it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from time import sleep

import pytest
import xxhash

from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.pack import pack
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.errors import ConfigError, ExpertReadError, TransferError
from foregate.experts import native_transfer, readers
from foregate.experts.native_transfer import NativeTransfer, Place, available
from foregate.experts.slots import SlotPool
from foregate.experts.store import PackedStore, open_store
from foregate.experts.transfer import ThreadedTransfer
from foregate.native import reads
from foregate.testing.faults import Fault, FaultyStore, Kind
from foregate.testing.native import native_over
from foregate.testing.stores import MemoryStore
from foregate.testing.transfers import until
from foregate.types import ExpertKey

SLOT = 40960
CHUNK = 4096
KEYS = [ExpertKey(0, expert) for expert in range(12)]

pytestmark = pytest.mark.skipif(not available(), reason="the compiled reader was not built")
Tiny = Callable[[str], Path]


class OneFile:
    """Random experts in one file, 4096 bytes behind its beginning. ``shift`` misplaces them all."""

    def __init__(self, path: Path, *, direct: bool = True, shift: int = 0) -> None:
        self.path, self.direct_io, self.slot_bytes, self.shift = str(path), direct, SLOT, shift
        self.experts = {key: random.Random(key.expert).randbytes(SLOT) for key in KEYS}
        path.write_bytes(bytes(4096 + shift) + b"".join(self.experts.values()))

    def place(self, key: ExpertKey) -> Place:
        checksum = xxhash.xxh3_128(self.experts[key]).hexdigest()
        return Place(4096 + self.shift + key.expert * SLOT, SLOT, checksum)

    def where(self, key: ExpertKey, at: int) -> str:
        return f"{self.path} at byte {self.place(key).offset + at}, {key}"

    def refuse_direct(self) -> None:
        self.direct_io = False


@pytest.fixture
def file(tmp_path: Path) -> OneFile:
    return OneFile(tmp_path / "experts")


def opened(file: OneFile, pool: SlotPool, **settings: int) -> NativeTransfer:
    return NativeTransfer(file, pool, chunk_bytes=CHUNK, **settings)


def test_the_compiled_parts_are_there_where_a_compiler_is() -> None:
    """They are optional: a broken one would be left out in silence, and everything would only be slower."""
    assert which("cc") is None or available()


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["any machine", "AVX2", "AVX-512"])
def test_digests_are_those_of_the_manifest(kind: int) -> None:
    library = reads.library()
    assert library is not None
    for blocks in (1, 2, 3, 4, 7, 16, 1029):
        data, found = random.Random(blocks).randbytes(1024 * blocks), (ctypes.c_uint64 * 2)()
        if not library.reads_digest(data, len(data), kind, found):
            pytest.skip("not on this processor")
        assert f"{found[1]:016x}{found[0]:016x}" == xxhash.xxh3_128(data).hexdigest()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("chunk_bytes", [4096, 12288, 1 << 20])
def test_bytes_are_exact_whatever_the_chunks_and_threads(tmp_path: Path, chunk_bytes: int, direct: bool) -> None:
    file, pool = OneFile(tmp_path / "experts", direct=direct), SlotPool(len(KEYS), SLOT)
    with NativeTransfer(file, pool, threads=4, chunk_bytes=chunk_bytes) as transfer:
        for turn in range(20):
            order = random.Random(turn).sample(KEYS, len(KEYS))
            tickets = [transfer.submit(key, slot, speculative=slot % 2 == 1) for slot, key in enumerate(order)]
            for ticket in tickets:
                transfer.wait(ticket)
                assert bytes(pool.view(ticket.slot)) == file.experts[ticket.key]
                assert sum(span.nbytes for span in ticket.spans) == SLOT
                assert all(span.began <= span.ended and span.reader in range(4) for span in ticket.spans)
        stats = transfer.stats()
    assert stats.demand_bytes == stats.prefetch_bytes == 20 * 6 * SLOT
    assert stats.chunks == 20 * 12 * -(-SLOT // chunk_bytes)
    assert (stats.failed, stats.rereads, stats.retries, stats.cancelled) == (0, 0, 0, 0)
    assert stats.active_s > 0
    assert stats.busy_s > 0


def test_no_slot_is_written_after_done_on_a_real_file(file: OneFile) -> None:
    rng, pool = random.Random(7), SlotPool(len(KEYS), SLOT)
    with opened(file, pool, threads=4) as transfer:
        for turn in range(200):
            tickets = [transfer.submit(key, slot, speculative=slot > 2) for slot, key in enumerate(KEYS)]
            for ticket in rng.sample(tickets[3:], 6):
                transfer.cancel(ticket)
            for ticket in [*tickets[:3], *rng.sample(tickets[3:], 4)]:
                transfer.promote(ticket)
                transfer.wait(ticket)
                assert bytes(pool.view(ticket.slot)) == file.experts[ticket.key]
            until(lambda: all(ticket.done for ticket in tickets))  # noqa: B023 (called here, not later)
            mark = bytes([turn % 251]) * SLOT
            for slot in range(pool.slots):
                pool.view(slot)[:] = mark
            assert all(pool.view(slot) == mark for slot in range(pool.slots))


def test_small_neighbours_are_read_at_once(file: OneFile) -> None:
    """Eight experts, submitted in any order, in few reads: one for the thread to be busy with, then the others."""
    pool, order = SlotPool(8, SLOT), random.Random(3).sample(KEYS[2:10], 8)
    with NativeTransfer(file, pool, threads=1) as transfer:
        fewest = 8
        for _ in range(20):
            tickets = [transfer.submit(key, slot, speculative=False) for slot, key in enumerate(order)]
            for ticket in tickets:
                transfer.wait(ticket)
                assert bytes(pool.view(ticket.slot)) == file.experts[ticket.key]
            fewest = min(fewest, len({span.began for ticket in tickets for span in ticket.spans}))
        stats = transfer.stats()
    assert fewest <= 4
    assert (stats.demand_bytes, stats.chunks, stats.retries) == (20 * 8 * SLOT, 20 * 8, 0)


def test_neighbours_of_a_bad_expert_are_read_all_the_same(file: OneFile) -> None:
    os.truncate(file.path, 4096 + 5 * SLOT + 5000)
    with NativeTransfer(file, SlotPool(8, SLOT), threads=1) as transfer:
        for _ in range(10):
            tickets = [transfer.submit(key, slot, speculative=False) for slot, key in enumerate(KEYS[:8])]
            for ticket in tickets[:5]:
                transfer.wait(ticket)
            for ticket in tickets[5:]:
                with pytest.raises(ExpertReadError, match="truncated"):
                    transfer.wait(ticket)


def test_demand_is_not_read_with_a_speculation_beside_it(file: OneFile) -> None:
    with NativeTransfer(file, SlotPool(8, SLOT), threads=1) as transfer:
        tickets = [transfer.submit(key, slot, speculative=slot % 2 == 0) for slot, key in enumerate(KEYS[:8])]
        for ticket in tickets[1::2]:
            transfer.wait(ticket)
        until(lambda: all(ticket.done for ticket in tickets))
        assert len({span.began for ticket in tickets for span in ticket.spans}) == 8


def test_a_truncated_file_is_an_error_that_names_the_place(file: OneFile) -> None:
    os.truncate(file.path, 4096 + 3 * SLOT + 5000)
    with opened(file, SlotPool(2, SLOT)) as transfer:
        transfer.wait(transfer.submit(KEYS[2], 0, speculative=False))
        with pytest.raises(
            ExpertReadError,
            match=rf"^{file.path} at byte \d+, .*expert=3.* truncated: .* {4096 + 3 * SLOT + 5000} bytes",
        ):
            transfer.wait(transfer.submit(KEYS[3], 1, speculative=False))
        assert transfer.stats().retries == 0, "the end of a file is not worth another try"


@pytest.mark.parametrize("at", [0, CHUNK * 3 + 17, SLOT - 1])
def test_one_flipped_bit_is_read_again_and_then_an_error(file: OneFile, at: int) -> None:
    with Path(file.path).open("r+b") as raw:
        raw.seek(4096 + 5 * SLOT + at)
        raw.write(bytes([file.experts[KEYS[5]][at] ^ 4]))
    with opened(file, SlotPool(1, SLOT), retries=2) as transfer:
        with pytest.raises(ExpertReadError, match=r"expert=5.*checksum mismatch"):
            transfer.wait(transfer.submit(KEYS[5], 0, speculative=False))
        stats = transfer.stats()
    assert (stats.rereads, stats.failed, stats.chunks) == (2, 1, 3 * SLOT // CHUNK)


def test_a_replaced_file_is_not_read_halfway(file: OneFile, tmp_path: Path) -> None:
    """A pack that is packed again under a running engine: the old one stays open."""
    with opened(file, SlotPool(1, SLOT)) as transfer:
        other = tmp_path / "other"
        other.write_bytes(bytes(4096 + 12 * SLOT))
        other.replace(file.path)
        transfer.wait(transfer.submit(KEYS[1], 0, speculative=False))


def test_a_file_that_is_gone_is_an_error_at_the_start(file: OneFile) -> None:
    Path(file.path).unlink()
    with pytest.raises(FileNotFoundError):
        opened(file, SlotPool(1, SLOT))


def test_what_cannot_be_read_is_tried_again_then_an_error_with_its_number(tmp_path: Path) -> None:
    file = OneFile(tmp_path / "experts", direct=False)
    file.path = str(tmp_path)
    with opened(file, SlotPool(1, SLOT), threads=1, retries=2) as transfer:
        with pytest.raises(ExpertReadError, match=rf"at byte 4096, .*\[Errno {errno.EISDIR}\] Is a directory") as got:
            transfer.wait(transfer.submit(KEYS[0], 0, speculative=False))
        assert isinstance(got.value.__cause__, OSError)
        assert transfer.stats().retries == 2


def test_an_input_output_error_that_passes_is_read_again(tmp_path: Path) -> None:
    """The kernel's own EIO: the file is this process's memory, and nothing is mapped where the expert should be."""
    file, libc = OneFile(tmp_path / "experts", direct=False), ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    mapping = (SLOT, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    address = 1 << 36  # far from where anything is mapped
    file.path = "/proc/self/mem"
    file.place = lambda key: Place(address, SLOT, xxhash.xxh3_128(bytes(SLOT)).hexdigest())  # type: ignore[method-assign]
    with opened(file, SlotPool(1, SLOT), threads=1, retries=1) as transfer:
        ticket = transfer.submit(KEYS[1], 0, speculative=True)
        until(lambda: ticket.done)
        assert not ticket.ok
        assert f"[Errno {errno.EIO}]" in str(ticket.error)
        assert libc.mmap(address, *mapping) == address, "something else was mapped there meanwhile"
        transfer.wait(ticket)
        stats = transfer.stats()
    libc.munmap(address, SLOT)
    assert (stats.failed_prefetch, stats.retries, stats.chunks) == (1, 1, SLOT // CHUNK)


def test_a_direct_read_that_is_refused_goes_through_the_page_cache(tmp_path: Path) -> None:
    """Some file systems refuse at the read, not at the open; here the misplaced expert does it."""
    file, pool = OneFile(tmp_path / "experts", shift=100), SlotPool(1, SLOT)
    with opened(file, pool) as transfer:
        transfer.wait(transfer.submit(KEYS[4], 0, speculative=False))
        assert bytes(pool.view(0)) == file.experts[KEYS[4]]
        assert transfer.stats().retries == 0
    assert not file.direct_io


def test_a_ticket_keeps_its_end_when_its_slot_is_used_again(file: OneFile) -> None:
    with opened(file, SlotPool(1, SLOT)) as transfer:
        first = transfer.submit(KEYS[0], 0, speculative=True)
        until(lambda: transfer.stats().prefetch_bytes == SLOT)
        until(lambda: first._states[0] == reads.Status.COMPLETE)
        second = transfer.submit(KEYS[1], 0, speculative=True)
        assert first.ok
        transfer.wait(second)


def test_a_slot_that_is_written_is_not_given_to_another_expert() -> None:
    store = FaultyStore(MemoryStore(SLOT), [Fault(Kind.HANG)])
    with native_over(store, SlotPool(1, SLOT)) as transfer:
        transfer.submit(KEYS[0], 0, speculative=False)
        with pytest.raises(AssertionError, match="still being written"):
            transfer.submit(KEYS[1], 0, speculative=False)
        store.release()


def test_an_expert_that_does_not_exist_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    pack(tiny("qwen2_moe"), tmp_path / "packed")
    store = open_store(open_checkpoint(tmp_path / "packed"))
    assert isinstance(store, PackedStore)
    transfer = NativeTransfer(store, SlotPool(1, store.slot_bytes))
    with transfer, pytest.raises(TransferError, match=r"expert 0\.999"):
        transfer.submit(ExpertKey(0, 999), 0, speculative=False)
    store.close()


def test_an_interrupt_is_heard_while_a_read_hangs() -> None:
    store = FaultyStore(MemoryStore(SLOT), [Fault(Kind.HANG)])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with native_over(store, SlotPool(1, SLOT)) as transfer:
            ticket = transfer.submit(KEYS[0], 0, speculative=False)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                transfer.wait(ticket)
            store.release()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_hanging_read_outlives_its_transfer_without_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_transfer, "JOIN_S", 0.05)
    left: list[object] = []
    monkeypatch.setattr(native_transfer, "_LEFT_BEHIND", left)
    store = FaultyStore(MemoryStore(SLOT), [Fault(Kind.HANG)])
    transfer = native_over(store, SlotPool(1, SLOT))
    transfer.submit(KEYS[0], 0, speculative=False)
    until(lambda: store.injected[Kind.HANG] == 1)
    transfer.close()
    transfer._finalizer()
    assert left, "the slots must not be unmapped under the read"
    store.release()
    sleep(0.05)


@pytest.mark.parametrize("chunk_bytes", [0, -4096, 1000, 6144])
def test_chunks_that_a_direct_read_cannot_do_are_refused(file: OneFile, chunk_bytes: int) -> None:
    with pytest.raises(ConfigError, match=str(chunk_bytes)):
        NativeTransfer(file, SlotPool(1, SLOT), chunk_bytes=chunk_bytes)


def test_a_process_that_forgets_to_close_ends(tmp_path: Path) -> None:
    """Threads that write to memory which the interpreter has given back would crash it at the exit."""
    script = (
        "from pathlib import Path; from foregate.experts.diskspeed import _Pieces\n"
        "from foregate.experts.native_transfer import NativeTransfer; from foregate.experts.slots import SlotPool\n"
        "from foregate.types import ExpertKey\n"
        "store = _Pieces(Path('f'), 1 << 20); pool = SlotPool(16, 1 << 20)\n"
        "transfer = NativeTransfer(store, pool, threads=4)\n"
        "tickets = [transfer.submit(ExpertKey(0, i), i, speculative=True) for i in range(16)]\n"
    )
    (tmp_path / "f").write_bytes(bytes(16 << 20))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# What the engine takes


@pytest.fixture
def packed(tiny: Tiny, tmp_path: Path) -> Path:
    pack(tiny("qwen2_moe"), tmp_path / "packed")
    return tmp_path / "packed"


def tokens(path: Path, **settings: object) -> tuple[list[int], Engine]:
    config = RunConfig(model=str(path), memory_budget="30%", prefetch="4", **settings)  # type: ignore[arg-type]
    with Engine(config) as engine:
        return [step.token_id for step in engine.stream(list(range(5, 25)), SamplingConfig(max_new_tokens=8))], engine


def test_tokens_are_the_same_with_and_without_the_compiled_reader(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native, engine = tokens(packed)
    assert isinstance(engine.transfer, NativeTransfer)
    assert engine.report is not None
    assert engine.report.as_dict()["readers"]["native"]
    assert engine.report.as_dict()["read_bytes"]["prefetch"] > 0
    monkeypatch.setattr(readers, "available", lambda: False)
    python, engine = tokens(packed)
    assert isinstance(engine.transfer, ThreadedTransfer)
    assert python == native


def test_a_store_that_is_wrapped_sees_every_read(packed: Path) -> None:
    config = RunConfig(model=str(packed), memory_budget="30%")
    with Engine(config, wrap_store=lambda store: FaultyStore(store, [])) as engine:
        assert isinstance(engine.transfer, ThreadedTransfer)


def test_a_pack_damaged_on_disk_is_an_error_not_a_token(packed: Path) -> None:
    experts = packed / "experts.safetensors"
    damaged = bytearray(experts.read_bytes())
    store = open_store(open_checkpoint(packed))
    assert isinstance(store, PackedStore)
    for expert in range(4):
        damaged[store.place(ExpertKey(1, expert)).offset + 7] ^= 1
    store.close()
    experts.write_bytes(damaged)
    with pytest.raises(ExpertReadError, match=r"experts.safetensors at byte \d+, expert \d of MoE layer 1: checksum"):
        tokens(packed)


# How many threads


@pytest.fixture
def measurable(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[PackedStore, SlotPool]]:
    """A pack that is large enough to be measured, and an empty cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(readers, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(readers, "ROUND_S", 0.002)
    store = open_store(open_checkpoint(packed))
    assert isinstance(store, PackedStore)
    yield store, SlotPool(6, store.slot_bytes)
    store.close()


def test_a_measurement_is_remembered(measurable: tuple[PackedStore, SlotPool], monkeypatch: pytest.MonkeyPatch) -> None:
    first = readers.choose(None, *measurable, [4, 4])
    assert first.chosen == "measured"
    assert set(first.gb_per_s) == set(readers.CANDIDATES)
    assert first.threads in readers.CANDIDATES
    monkeypatch.setattr(readers, "_measure", lambda *_: pytest.fail("measured twice"))
    second = readers.choose(None, *measurable, [4, 4])
    assert (second.chosen, second.threads, second.gb_per_s) == ("remembered", first.threads, first.gb_per_s)


def test_other_expert_sizes_are_measured_anew(measurable: tuple[PackedStore, SlotPool]) -> None:
    store, pool = measurable
    readers.choose(None, store, pool, [4, 4])
    store.slot_bytes += 4096
    assert readers.choose(None, store, SlotPool(6, store.slot_bytes), [4, 4]).chosen == "measured"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', "null"])
def test_a_broken_memory_is_measured_over(measurable: tuple[PackedStore, SlotPool], content: str) -> None:
    readers.cache_file().parent.mkdir(parents=True)
    readers.cache_file().write_text(content)
    assert readers.choose(None, *measurable, [4, 4]).chosen == "measured"
    assert readers.choose(None, *measurable, [4, 4]).chosen == "remembered"


def test_a_damaged_expert_does_not_fail_a_run_that_may_never_read_it(measurable: tuple[PackedStore, SlotPool]) -> None:
    experts = Path(measurable[0].path)
    experts.write_bytes(bytes(experts.stat().st_size))
    found = readers.choose(None, *measurable, [4, 4])
    assert (found.threads, found.chosen) == (4, "default")
    assert "checksum" in found.why


def test_a_given_number_of_threads_is_taken(measurable: tuple[PackedStore, SlotPool]) -> None:
    found = readers.choose(3, *measurable, [4, 4])
    assert (found.threads, found.chosen) == (3, "given")
    assert not readers.cache_file().exists()


def test_the_fewest_threads_win_that_are_nearly_as_fast(measurable: tuple[PackedStore, SlotPool]) -> None:
    assert readers.fewest({2: 1.3, 4: 1.36, 8: 1.4}) == 2
    assert readers.fewest({2: 1.0, 4: 2.0, 8: 1.9}) == 4


def test_one_thread_is_never_chosen_however_fast_alone(measurable: tuple[PackedStore, SlotPool]) -> None:
    assert readers.fewest({1: 2.0, 2: 1.9, 4: 2.0, 8: 1.8}) == 2
    assert readers.fewest({1: 9.0, 2: 1.9, 4: 2.0, 8: 1.8}) == 2
    store, pool = measurable
    name = readers._name(store, native=readers.is_native(store))
    readers._remember(name, {1: 2.0, 2: 1.9, 4: 1.9, 8: 1.9})  # by a version that tried one
    found = readers.choose(None, store, pool, [4, 4])
    assert (found.chosen, found.threads >= 2) == ("measured", True)
