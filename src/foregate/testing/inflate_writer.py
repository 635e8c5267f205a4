"""Writes the shards of an inflated checkpoint, a block at a time, and the small files beside them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from foregate.checkpoint.origin import INFLATION_FILE
from foregate.checkpoint.source_reader import SourceReader
from foregate.errors import CheckpointError
from foregate.testing.inflate_fill import blocks
from foregate.testing.inflate_rules import Planned
from foregate.testing.shards import header, shard_name, split

Progress = Callable[[int, int], None]
"""Told (bytes written, bytes in all) after every tensor."""

NAME = INFLATION_FILE
"""In the output: of what it was made, and how."""

COPIED = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "generation_config", "chat_template")
COPIED_NAMES = ("LICENSE", "NOTICE")


def write_weights(directory: Path, tensors: list[Planned], seed: int, shard_bytes: int, progress: Progress) -> None:
    """Every shard, each synced and dropped from the page cache, then the index. Raises OSError, CheckpointError."""
    shards = split(tensors, shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors)
    weight_map: dict[str, str] = {}
    done = 0
    with SourceReader() as reader:
        for number, shard in enumerate(shards, start=1):
            name = shard_name(number, len(shards))
            with (directory / name).open("wb") as file:
                file.write(header(shard))
                for tensor in shard:
                    _write_tensor(file, tensor, reader, seed)
                    weight_map[tensor.name] = name
                    done += tensor.nbytes
                    progress(done, total)
                _settle(file)
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:
        file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
        _settle(file)


def copy_small_files(source: Path, directory: Path) -> None:
    """Tokenizer, generation config and licence. The model's card speaks of another size and stays."""
    for path in sorted(source.iterdir()):
        if path.is_file() and (path.name.startswith(COPIED) or path.name in COPIED_NAMES):
            shutil.copyfile(path, directory / path.name)


def check_space(directory: Path, needed: int) -> None:
    """Raises CheckpointError with both numbers if fewer than ``needed`` bytes are free."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise CheckpointError(f"{directory} has {free} bytes free, the inflated checkpoint needs {needed}")


def _write_tensor(file: BinaryIO, tensor: Planned, reader: SourceReader, seed: int) -> None:
    original = tensor.source
    content = reader.read(original.path, original.offset, original.nbytes)
    for block in blocks(tensor, content, seed):
        file.write(block.data)


def _settle(file: BinaryIO) -> None:
    """Onto the disk, and out of the page cache: what is built to be read cold must not be warm."""
    file.flush()
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
