"""Reading experts from disk: chunks, direct and buffered, short and failing reads, on one thread and on many."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest

from foregate.checkpoint.opening import Checkpoint, open_checkpoint
from foregate.checkpoint.pack import pack
from foregate.checkpoint.readplan import CHUNK_BYTES
from foregate.errors import CheckpointError, ExpertReadError
from foregate.experts.store import IDLE_BUFFERS, DirectStore, PackedStore, _DirectRead, open_store
from foregate.types import ExpertKey
from test_checkpoint_support import keys, read_slot, slots, tiny

KEY = ExpertKey(1, 3)
KINDS = ("direct", "packed")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model, as it was and packed. Slots of gpt_oss have padding; its tensors are fused and lie far apart."""
    directory = tmp_path_factory.mktemp("models")
    tiny(directory / "direct", "gpt_oss")
    pack(directory / "direct", directory / "packed")
    return {kind: directory / kind for kind in KINDS}


@pytest.fixture(params=KINDS)
def checkpoint(request: pytest.FixtureRequest, models: dict[str, Path]) -> Checkpoint:
    return open_checkpoint(models[request.param])


@pytest.fixture
def store(checkpoint: Checkpoint) -> Iterator[Any]:
    opened = open_store(checkpoint, 4096)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[ExpertKey, bytes]:
    return slots(open_checkpoint(models["direct"]))


@pytest.fixture
def slot(store: Any) -> mmap:
    return mmap(-1, store.slot_bytes)


def replace_preadv(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., int]) -> list[tuple[int, int]]:
    """Put ``answer(real, fd, buffers, offset)`` in the place of os.preadv. Returns (offset, length) of the calls."""
    real, calls = os.preadv, []

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append((offset, len(buffers[0])))
        return answer(real, fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return calls


def refuse_direct(monkeypatch: pytest.MonkeyPatch, code: int = errno.EINVAL) -> list[int]:
    """A file system that does not open with O_DIRECT. Returns the flags of successful opens."""
    real, opened = os.open, []

    def open_(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code), path)
        opened.append(flags)
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", open_)
    return opened


def test_the_right_store_for_each(models: dict[str, Path]) -> None:
    for kind, cls in zip(KINDS, (DirectStore, PackedStore), strict=True):
        store = open_store(open_checkpoint(models[kind]))
        assert isinstance(store, cls)
        store.close()
    with pytest.raises(CheckpointError, match="is a pack"):
        DirectStore(open_checkpoint(models["packed"]))
    with pytest.raises(CheckpointError, match="is not a pack"):
        PackedStore(open_checkpoint(models["direct"]))


@pytest.mark.parametrize("chunk_bytes", [4096, 8192, CHUNK_BYTES])
def test_chunk_size_makes_no_difference(
    checkpoint: Checkpoint, chunk_bytes: int, expected: dict[ExpertKey, bytes]
) -> None:
    assert slots(checkpoint, chunk_bytes) == expected


def test_reads_go_around_the_page_cache(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, expected: dict[ExpertKey, bytes]
) -> None:
    real, flags = os.open, []

    def open_(path: Any, flag: int, *arguments: Any) -> int:
        flags.append(flag)
        return real(path, flag, *arguments)

    monkeypatch.setattr(os, "open", open_)
    calls = replace_preadv(monkeypatch, lambda real, *arguments: real(*arguments))
    store = open_store(checkpoint, 4096)
    if not store.direct_io:
        pytest.skip("the file system of the temporary directory refuses O_DIRECT")
    assert read_slot(store, KEY, mmap(-1, store.slot_bytes)) == expected[KEY]
    store.close()
    assert all(flag & os.O_DIRECT for flag in flags)
    assert all(offset % 4096 == 0 and length % 4096 == 0 for offset, length in calls)


def test_begin_reads_nothing(store: Any, slot: mmap, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = replace_preadv(monkeypatch, lambda real, *arguments: real(*arguments))
    store.begin(KEY, memoryview(slot))
    assert calls == []


def test_disk_bytes_are_what_is_read(store: Any, slot: mmap, monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes = []

    def counting(real: Any, *arguments: Any) -> int:
        read_bytes.append(real(*arguments))
        return read_bytes[-1]

    calls = replace_preadv(monkeypatch, counting)
    for key in (KEY, ExpertKey(3, 7)):
        read_bytes.clear()
        read = store.begin(key, memoryview(slot))
        for index in range(read.chunks):
            read.read(index)
        read.finish()
        assert sum(read_bytes) == read.disk_bytes
        assert len(set(calls)) == len(calls)
        calls.clear()


def test_where_names_file_offset_and_expert(store: Any, slot: mmap, checkpoint: Checkpoint) -> None:
    read = store.begin(KEY, memoryview(slot))
    places = [read.where(index) for index in range(read.chunks)]
    assert len(set(places)) == read.chunks
    assert all(str(checkpoint.directory) in place for place in places)
    assert all("expert 3 of MoE layer 1" in place and "at byte" in place for place in places)


def test_chunks_in_any_order_on_many_threads(checkpoint: Checkpoint, expected: dict[ExpertKey, bytes]) -> None:
    store = open_store(checkpoint, 4096)
    buffers = {key: mmap(-1, store.slot_bytes) for key in keys(checkpoint)}
    reads = {key: store.begin(key, memoryview(buffer)) for key, buffer in buffers.items()}
    jobs = [(read, index) for read in reads.values() for index in range(read.chunks)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda job: job[0].read(job[1]), jobs[::2] + jobs[1::2]))
        list(pool.map(lambda read: read.finish(), reads.values()))
    assert {key: buffer[: store.layout(key.layer).nbytes] for key, buffer in buffers.items()} == expected
    store.close()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_file_system_that_refuses_at_open(
    code: int,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    expected: dict[ExpertKey, bytes],
) -> None:
    refuse_direct(monkeypatch, code)
    dropped = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, count, advice: dropped.append((offset, count, advice)))
    with caplog.at_level(logging.WARNING, "foregate"):
        store = open_store(checkpoint, 4096)
        assert store.direct_io is False
        slot = mmap(-1, store.slot_bytes)
        assert {key: read_slot(store, key, slot) for key in keys(checkpoint)} == expected
    assert len(caplog.records) == 1
    assert "O_DIRECT refused" in caplog.text
    assert dropped
    assert all(advice == os.POSIX_FADV_DONTNEED for *_, advice in dropped)
    store.close()


def test_file_system_that_refuses_at_the_first_read(
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    expected: dict[ExpertKey, bytes],
) -> None:
    import fcntl

    def answer(real: Any, fd: int, buffers: Any, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return int(real(fd, buffers, offset))

    replace_preadv(monkeypatch, answer)
    with caplog.at_level(logging.WARNING, "foregate"):
        assert slots(checkpoint) == expected
    assert len(caplog.records) == 1


def test_refusal_is_logged_nowhere_where_there_is_none(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(checkpoint)
    assert store.direct_io is not bool(caplog.records)
    store.close()


def test_short_reads_are_continued(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, expected: dict[ExpertKey, bytes]
) -> None:
    replace_preadv(monkeypatch, lambda real, fd, buffers, offset: real(fd, [buffers[0][:4096]], offset))
    assert slots(checkpoint, CHUNK_BYTES) == expected


def test_short_reads_that_end_inside_a_block_are_continued(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, expected: dict[ExpertKey, bytes]
) -> None:
    """What is read of the last block is thrown away: a direct read cannot start there."""

    def answer(real: Any, fd: int, buffers: Any, offset: int) -> int:
        count = int(real(fd, buffers, offset))
        return count - 100 if count > 4096 else count

    replace_preadv(monkeypatch, answer)
    assert slots(checkpoint, CHUNK_BYTES) == expected


def test_a_read_that_never_completes_a_block_is_an_error(
    store: Any, slot: mmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not store.direct_io:
        pytest.skip("the file system of the temporary directory refuses O_DIRECT")
    replace_preadv(monkeypatch, lambda real, fd, buffers, offset: 100)
    with pytest.raises(OSError, match="stops short of one block"):
        store.begin(KEY, memoryview(slot)).read(0)


def test_errors_of_the_device_pass_through_and_a_retry_works(
    store: Any, slot: mmap, monkeypatch: pytest.MonkeyPatch, expected: dict[ExpertKey, bytes]
) -> None:
    def failing(*arguments: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    read = store.begin(KEY, memoryview(slot))
    with monkeypatch.context() as patch:
        replace_preadv(patch, failing)
        with pytest.raises(OSError, match="Input/output error"):
            read.read(0)
    for index in range(read.chunks):
        read.read(index)
    read.finish()
    assert slot[: store.layout(KEY.layer).nbytes] == expected[KEY]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_was_cut_meanwhile(kind: str, tmp_path: Path) -> None:
    tiny(tmp_path / "direct", "gpt_oss")
    pack(tmp_path / "direct", tmp_path / "packed")
    checkpoint = open_checkpoint(tmp_path / kind)
    store = open_store(checkpoint, 4096)
    slot = mmap(-1, store.slot_bytes)
    path = tmp_path / kind / ("experts.safetensors" if kind == "packed" else "model.safetensors")
    read = store.begin(ExpertKey(3, 7), memoryview(slot))
    size = int(read.where(0).split("at byte ")[1].split(",")[0]) + 1000
    os.truncate(path, size)
    message = rf"{path} at byte \d+, expert 7 of MoE layer 3: truncated: .* found {size}"
    with pytest.raises(ExpertReadError, match=message):
        read_slot(store, ExpertKey(3, 7), slot)
    store.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_vanished(kind: str, tmp_path: Path) -> None:
    tiny(tmp_path / "direct")
    pack(tmp_path / "direct", tmp_path / "packed")
    checkpoint = open_checkpoint(tmp_path / kind)
    for path in (tmp_path / kind).glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"\.safetensors: cannot be read: No such file"):
        open_store(checkpoint)


@pytest.mark.parametrize("where", [0, 5000, -1])
def test_a_flipped_bit_in_a_pack_is_seen(where: int, tmp_path: Path) -> None:
    pack(tiny(tmp_path / "direct", "gpt_oss"), tmp_path / "packed")
    checkpoint = open_checkpoint(tmp_path / "packed")
    assert checkpoint.manifest is not None
    place = checkpoint.manifest.find(KEY)
    path = tmp_path / "packed" / "experts.safetensors"
    with path.open("r+b") as file:
        file.seek(place.offset + where % place.nbytes)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x80]))
    store = open_store(checkpoint)
    slot = mmap(-1, store.slot_bytes)
    message = rf"{path} at byte {place.offset}, expert 3 of MoE layer 1: checksum mismatch"
    with pytest.raises(ExpertReadError, match=message):
        read_slot(store, KEY, slot)
    read_slot(store, ExpertKey(1, 4), slot)
    store.close()


def test_scratch_is_held_only_by_reads_under_way(models: dict[str, Path]) -> None:
    store = DirectStore(open_checkpoint(models["direct"]), 4096)
    pool, slot = store._scratch, mmap(-1, store.slot_bytes)
    for expert in range(8):
        read_slot(store, ExpertKey(0, expert), slot)
    assert len(pool._free) == 1
    one, two, three = (store.begin(ExpertKey(0, expert), memoryview(slot)) for expert in range(3))
    assert len(pool._free) == 1
    one.read(0)
    two.read(0)
    assert len(pool._free) == 0
    del one, three  # cancelled: one after its first chunk, one before
    assert len(pool._free) == 1
    for index in range(two.chunks):
        two.read(index)
    two.finish()
    assert [len(buffer) for buffer in pool._free] == [store.scratch_bytes] * 2
    store.close()


def test_scratch_is_bounded_while_idle_and_released_on_close(models: dict[str, Path]) -> None:
    store = DirectStore(open_checkpoint(models["direct"]), 4096)
    pool, slot = store._scratch, mmap(-1, store.slot_bytes)
    reads = [store.begin(ExpertKey(0, expert % 8), memoryview(slot)) for expert in range(12)]
    for read in reads:
        read.read(0)
    late = reads.pop()
    del read
    reads.clear()
    assert len(pool._free) == IDLE_BUFFERS == 8
    store.close()
    assert pool._free == []
    del late  # a read that outlives the store gives nothing back
    assert pool._free == []


def test_a_read_that_was_interrupted_while_it_was_made(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors in ``__del__`` are warnings, and warnings are errors here."""

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    store = DirectStore(open_checkpoint(models["direct"]), 4096)
    with monkeypatch.context() as patch:
        patch.setattr("foregate.experts.store._Read.__init__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.begin(KEY, memoryview(mmap(-1, store.slot_bytes)))
    _DirectRead.__new__(_DirectRead).__del__()
    store.close()


def test_neighbouring_tensors_are_one_read(tmp_path: Path) -> None:
    """The three matrices of one expert lie side by side in files of the hub: no block is read twice."""
    store = DirectStore(open_checkpoint(tiny(tmp_path, "olmoe")))
    read = store.begin(KEY, memoryview(mmap(-1, store.slot_bytes)))
    assert read.chunks == 1
    assert read.disk_bytes <= 12288 + 4096
    store.close()


@pytest.mark.parametrize("key", [ExpertKey(4, 0), ExpertKey(0, 8), ExpertKey(0, -1)])
def test_keys_that_the_model_does_not_have(store: Any, slot: mmap, key: ExpertKey) -> None:
    with pytest.raises(IndexError):
        store.begin(key, memoryview(slot))


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_closed_files_are_closed(checkpoint: Checkpoint) -> None:
    before = open_files()
    store = open_store(checkpoint)
    read_slot(store, KEY, mmap(-1, store.slot_bytes))
    store.close()
    assert open_files() == before
