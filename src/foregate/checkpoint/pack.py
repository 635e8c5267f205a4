"""Rewriting a checkpoint so that every expert is one aligned read: the dense weights, the experts, a manifest.

Everything is written to a hidden directory beside the output and renamed at the end, so that a half-written pack never
looks finished. A killed pack resumes; one that does not fit leaves nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foregate.checkpoint import journal as journals
from foregate.checkpoint.manifest import is_pack, read_manifest
from foregate.checkpoint.opening import Checkpoint, open_checkpoint
from foregate.checkpoint.packorder import Orders, by_expert, check_orders
from foregate.checkpoint.packwriter import PackWriter
from foregate.checkpoint.precision import AS_SOURCE, Precision
from foregate.errors import PackError

NO_ROOM = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "no space left on the device",
    errno.EFBIG: "a file is larger than the system allows (ulimit -f, or the file system)",
}
"""Errors that running again would only repeat."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class PackResult:
    """What ``pack`` did. ``resumed`` experts were there from an interrupted run; ``finished_before`` is all of it."""

    directory: Path
    experts: int
    nbytes: int
    resumed: int
    finished_before: bool


def pack(
    source: Path | str,
    out: Path | str,
    progress: Progress = lambda done, total: None,
    precision: Precision = AS_SOURCE,
    orders: Orders | None = None,
) -> PackResult:
    """Pack the checkpoint directory ``source`` into the directory ``out``, quantised as ``precision`` says.

    ``orders`` gives every layer's experts in file order (None: by id). Raises PackError, in one line, where ``out``
    holds something else, cannot be written or the disk is full; CheckpointError where ``source`` cannot be read.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.packed:
        raise PackError(f"{source} is a pack already")
    orders = orders or by_expert(checkpoint.spec.experts_per_layer)
    check_orders(orders, checkpoint.spec.experts_per_layer)
    out = Path(out).resolve()
    temporary = out.parent / f".{out.name}.partial"
    try:
        if _finished(checkpoint, out, precision, orders):
            return _done_before(checkpoint, out)
        temporary.mkdir(parents=True, exist_ok=True)
        writer = PackWriter(checkpoint, temporary, precision, orders)
    except OSError as error:
        raise _explain(error, out, temporary) from error
    # the writer's lock is held until the pack has its name: two packs to one place cannot both rename
    try:
        if _finished(checkpoint, out, precision, orders):
            shutil.rmtree(temporary, ignore_errors=True)
            return _done_before(checkpoint, out)
        _check_space(out.parent, writer.remaining_bytes)
        writer.run(progress)
        temporary.replace(out)
        _sync_directory(out.parent)
        (out / journals.NAME).unlink(missing_ok=True)
    except OSError as error:
        raise _explain(error, out, temporary, begun=True) from error
    finally:
        writer.close()
    return PackResult(out, checkpoint.spec.experts, _size(out), writer.resumed, False)


def _done_before(checkpoint: Checkpoint, out: Path) -> PackResult:
    return PackResult(out, checkpoint.spec.experts, _size(out), checkpoint.spec.experts, True)


def _finished(checkpoint: Checkpoint, out: Path, precision: Precision, orders: Orders) -> bool:
    """Whether ``out`` is the pack that is asked for. Raises PackError if it is anything else but free."""
    if out == checkpoint.directory.resolve():
        raise PackError(f"{out}: the output is the checkpoint itself")
    if not out.exists():
        return False
    if not out.is_dir():
        raise PackError(f"{out} is a file")
    if is_pack(out):
        manifest = read_manifest(out)
        if manifest.fingerprint != checkpoint.fingerprint:
            raise PackError(f"{out} is a pack of another model, or of this one as it was; choose another output")
        if manifest.precision != precision:
            found = f"{manifest.precision.name}, not {precision.name}"
            raise PackError(f"{out} is a pack of this model with {found}; choose another output")
        if manifest.orders != orders:
            raise PackError(f"{out} is a pack of this model in another order; choose another output")
        # raises PackError where files are missing, cut or damaged
        open_checkpoint(out)
        # there if the run that finished the pack was killed in its very last step
        (out / journals.NAME).unlink(missing_ok=True)
        return True
    if any(out.iterdir()):
        raise PackError(f"{out} is not empty and not a pack; choose another output")
    if os.path.ismount(out):
        raise PackError(f"{out} is a mount point; choose a directory in it")
    return False


def _check_space(directory: Path, needed: int) -> None:
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed, {free} are free")


def _explain(error: OSError, out: Path, temporary: Path, *, begun: bool = False) -> PackError:
    """The error in one line, after removing what running again could not complete."""
    if error.errno in NO_ROOM:
        shutil.rmtree(temporary, ignore_errors=True)
        return PackError(f"{out}: {NO_ROOM[error.errno]} ({error.strerror}); nothing was kept")
    message = f"{out}: cannot be written: {error.strerror or error}"
    return PackError(f"{message}; running it again resumes (what is there is in {temporary})" if begun else message)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
