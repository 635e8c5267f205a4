"""The frame of a safetensors checkpoint that is written tensor by tensor: which shard has what, headers, the index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar


class Sized(Protocol):
    """A tensor of which everything but the values is known. ``dtype`` as safetensors names it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


def split(tensors: Iterable[T], shard_bytes: int) -> list[list[T]]:
    """The tensors in order, at most ``shard_bytes`` a shard unless one alone is larger; an expert may straddle two."""
    shards: list[list[T]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def shard_name(number: int, shards: int) -> str:
    """File name of the ``number``-th of ``shards``, from 1."""
    return f"model-{number:05}-of-{shards:05}.safetensors"


def header(shard: Iterable[Sized]) -> bytes:
    """The safetensors header: its length in 8 bytes, then JSON padded with spaces to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
