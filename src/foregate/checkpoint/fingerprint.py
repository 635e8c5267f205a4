"""The identity of a checkpoint: a hash of its config, of its tensor table and of samples of its weights.

The samples are at fixed places, so that a copy has the same fingerprint and a model that was trained further another
one, at the price of a few hundred small reads a file. A change of a few bytes in a large file can escape them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from foregate.checkpoint.source_reader import SourceReader
from foregate.types import Segment

IGNORED_KEYS = ("_name_or_path", "transformers_version")
"""Keys of config.json that saving the same model again may change."""

WHOLE_BYTES = 16 << 20
"""Tensors of a file that are no more than this are read whole: a few milliseconds."""

SAMPLES = 256
"""Most samples of one file."""

SAMPLES_IN_ALL = 8192
"""Most samples of a checkpoint of many files, unless each has ``FEWEST``: below a second on an NVMe drive."""

FEWEST = 64
"""Samples that a file gets however many there are."""

SAMPLE_BYTES = 4096

_NUMBERS = re.compile(r"\d+")


def fingerprint(config: dict[str, Any], tensors: Iterable[Segment]) -> str:
    """32 hexadecimal digits, the same wherever the directory lies. Traces, predictors and packs carry it.

    Reads samples of the files that ``tensors`` lie in. Raises CheckpointError where one cannot be read.
    """
    kept = {key: value for key, value in config.items() if key not in IGNORED_KEYS}
    digest = xxhash.xxh3_128(json.dumps(kept, sort_keys=True).encode())
    ordered = sorted(tensors, key=lambda tensor: tensor.tensor)
    for tensor in ordered:
        row = [tensor.tensor, tensor.dtype, tensor.shape, Path(tensor.path).name, tensor.offset]
        digest.update(json.dumps(row).encode())
    with SourceReader(scattered=True) as reader:
        for path, offset, nbytes in _samples(ordered):
            digest.update(reader.read(path, offset, nbytes))
    return str(digest.hexdigest())


def _samples(tensors: Sequence[Segment]) -> Iterator[tuple[str, int, int]]:
    """File, offset and bytes of every sample: by file name, then in the order of the file."""
    files: dict[str, list[Segment]] = {}
    for tensor in tensors:
        files.setdefault(tensor.path, []).append(tensor)
    budget = min(SAMPLES, max(FEWEST, SAMPLES_IN_ALL // max(1, len(files))))
    for path in sorted(files, key=lambda path: Path(path).name):
        places = {place for tensor, count in _shares(files[path], budget) for place in _places(tensor, count)}
        yield from ((path, offset, nbytes) for offset, nbytes in sorted(places))


def _shares(tensors: Sequence[Segment], budget: int) -> Iterator[tuple[Segment, int]]:
    """Tensors to sample, and how often. Every kind of tensor (names that differ in numbers only) has a fair share,
    or training the routers alone would be missed among thousands of experts."""
    if sum(tensor.nbytes for tensor in tensors) <= WHOLE_BYTES:
        yield from ((tensor, 0) for tensor in tensors)
        return
    kinds: dict[str, list[Segment]] = {}
    for tensor in tensors:
        kinds.setdefault(_NUMBERS.sub("#", tensor.tensor), []).append(tensor)
    groups = [list(tensors)] if len(kinds) > budget else list(kinds.values())
    for group in groups:
        share = budget // len(groups)
        chosen = min(share, len(group))
        for index in range(chosen):
            yield group[_spread(index, chosen, len(group))], share // chosen


def _places(tensor: Segment, count: int) -> list[tuple[int, int]]:
    """Offset and bytes of ``count`` samples of ``tensor``; 0 is all of it."""
    if not count or tensor.nbytes <= count * SAMPLE_BYTES:
        return [(tensor.offset, tensor.nbytes)]
    room = tensor.nbytes - SAMPLE_BYTES
    return [(tensor.offset + _spread(index, count, room), SAMPLE_BYTES) for index in range(count)]


def _spread(index: int, count: int, room: int) -> int:
    """The middle of part ``index`` of ``count`` equal parts of ``room``."""
    return room * (2 * index + 1) // (2 * count)
