"""Is a pack what it says it is: every checksum and, given the original, every byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from foregate.checkpoint.dense_int8 import candidates
from foregate.checkpoint.manifest import DENSE_FILE, EXPERTS_FILE, Manifest, read_manifest
from foregate.checkpoint.opening import Checkpoint, open_checkpoint, plan_of
from foregate.checkpoint.packdense import DenseTensor, dense_tensors
from foregate.checkpoint.packslot import make_slot
from foregate.checkpoint.source_reader import SourceReader
from foregate.errors import PackError
from foregate.types import ExpertKey, Segment

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was compared. ``source`` is None where only checksums were."""

    directory: Path
    experts: int
    nbytes: int
    source: Path | None


def verify(
    pack_dir: Path | str, source: Path | str | None = None, progress: Progress = lambda done, total: None
) -> VerifyReport:
    """Read the whole pack. Raises PackError naming file, offset and expert of the first difference."""
    manifest = read_manifest(Path(pack_dir))
    packed = open_checkpoint(pack_dir)
    original = None if source is None else _original(source, manifest)
    total = manifest.experts_nbytes + manifest.dense_nbytes
    with SourceReader() as reader:
        _verify_dense_file(packed, manifest, reader)
        _verify_header(packed, manifest, reader)
        if original is not None:
            _compare_dense(packed, original, reader)
        done = manifest.dense_nbytes
        for key in manifest.order():
            done += _verify_expert(packed, manifest, original, key, reader)
            progress(done, total)
    return VerifyReport(packed.directory, packed.spec.experts, total, original.directory if original else None)


def verify_dense(checkpoint: Checkpoint) -> None:
    """Read the dense file of a pack once; an original has no checksum to compare with.

    Raises PackError naming the file. To be called before it is loaded: what was read stays in the page cache.
    """
    if checkpoint.manifest is not None:
        with SourceReader(keep=True) as reader:
            _verify_dense_file(checkpoint, checkpoint.manifest, reader)


def _original(source: Path | str, manifest: Manifest) -> Checkpoint:
    original = open_checkpoint(source)
    if original.packed:
        raise PackError(f"{source} is a pack itself; compare with the original checkpoint")
    if original.fingerprint != manifest.fingerprint:
        raise PackError(f"the pack was not made from {source}: fingerprint {manifest.fingerprint}, not that one's")
    return original


def _verify_dense_file(packed: Checkpoint, manifest: Manifest, reader: SourceReader) -> None:
    path = packed.directory / DENSE_FILE
    digest = xxhash.xxh3_128()
    for piece in reader.pieces(str(path), 0, manifest.dense_nbytes):
        digest.update(piece)
    if digest.hexdigest() != manifest.dense_checksum or path.stat().st_size != manifest.dense_nbytes:
        raise PackError(f"{path} at byte 0: dense weights: checksum mismatch")


def _verify_header(packed: Checkpoint, manifest: Manifest, reader: SourceReader) -> None:
    """Foregate itself does not read it, but others may."""
    path = packed.directory / EXPERTS_FILE
    wanted = plan_of(manifest).header
    difference = _first_difference(reader.read(str(path), 0, len(wanted)), memoryview(wanted))
    if difference is not None:
        raise PackError(f"{path} at byte {difference}: the header is not the one that was written")


def _compare_dense(packed: Checkpoint, original: Checkpoint, reader: SourceReader) -> None:
    int8 = candidates(original.skeleton) if packed.precision.dense.bits else ()
    wanted = {tensor.name: tensor for tensor in dense_tensors(original.dense.values(), int8)}
    if packed.dense.keys() != wanted.keys():
        odd = sorted(packed.dense.keys() ^ wanted.keys())
        raise PackError(f"{packed.directory / DENSE_FILE}: other dense tensors than the original: {odd[0]!r}")
    for name, tensor in packed.dense.items():
        _compare_tensor(name, tensor, wanted[name], reader)


def _compare_tensor(name: str, ours: Segment, theirs: DenseTensor, reader: SourceReader) -> None:
    done = 0
    with SourceReader() as other:
        for piece in theirs.pieces(other):
            mine = reader.read(ours.path, ours.offset + done, len(piece))
            difference = _first_difference(mine, piece)
            if difference is not None:
                where = f"{ours.path} at byte {ours.offset + done + difference}"
                raise PackError(f"{where}: {name} differs from {theirs.source.path}")
            done += len(piece)


def _verify_expert(
    packed: Checkpoint, manifest: Manifest, original: Checkpoint | None, key: ExpertKey, reader: SourceReader
) -> int:
    expert = manifest.find(key)
    path = packed.directory / EXPERTS_FILE
    found = reader.read(str(path), expert.offset, expert.nbytes)
    name = f"expert {key.expert} of MoE layer {key.layer}"
    if xxhash.xxh3_128(found).hexdigest() != expert.checksum:
        raise PackError(f"{path} at byte {expert.offset}: {name}: checksum mismatch")
    if original is not None and original.sources is not None:
        layer = original.sources.layers[key.layer]
        segments = original.sources.segments(key)
        module = original.skeleton.moe[key.layer]
        wanted = make_slot(layer, segments, reader.parts(segments), module, manifest.precision, key)
        difference = _first_difference(found, memoryview(wanted))
        if difference is not None:
            where = f"{path} at byte {expert.offset + difference}"
            raise PackError(f"{where}: {name} differs from the original ({segments[0].tensor} …)")
    return expert.nbytes


def _first_difference(one: memoryview, other: memoryview) -> int | None:
    if one == other:
        return None
    shorter = min(len(one), len(other))
    differs = np.frombuffer(one, np.uint8, shorter) != np.frombuffer(other, np.uint8, shorter)
    return int(differs.argmax()) if differs.any() else shorter
