"""Which safetensors files make up a checkpoint directory, and all their tensors. Chooses as transformers does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foregate.checkpoint.headers import read_header
from foregate.checkpoint.jsonfile import parse
from foregate.errors import CheckpointError, UnsupportedModelError
from foregate.types import Segment

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")


@dataclass(frozen=True, slots=True)
class Shards:
    """The weight files of a checkpoint. ``tensors``: name → whole tensor; ``files`` in the order they are loaded."""

    directory: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Segment]
    metadata: Mapping[str, Any]


def read_shards(directory: Path, weights: object = None) -> Shards:
    """The files of ``directory`` and their tensors; ``weights`` is config.json's ``transformers_weights``, if set.

    Raises CheckpointError naming the file for anything missing or inconsistent; UnsupportedModelError for .bin only.
    """
    name = _default(directory) if weights is None else weights
    if not isinstance(name, str):
        raise CheckpointError(f"{directory / 'config.json'}: transformers_weights is {name!r}, not a file name")
    if not name.endswith(".json"):
        path = directory / _plain(directory / "config.json", name)
        return Shards(directory, (path,), read_header(path), {})
    index, weight_map, metadata = _index(directory / name)
    files = tuple(directory / _plain(index, shard) for shard in sorted(set(weight_map.values())))
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path}: shard is missing, but {index.name} names it")
    tensors = _merge(files)
    _check_map(index, weight_map, tensors)
    return Shards(directory, files, tensors, metadata)


def _default(directory: Path) -> str:
    for name in (SINGLE, INDEX):
        if (directory / name).is_file():
            return name
    if any(path.suffix in PICKLES for path in directory.iterdir()):
        raise UnsupportedModelError(
            f"{directory} has only pickled weights (.bin, .pt); convert them to safetensors first"
        )
    raise CheckpointError(f"{directory} has no weights: neither {SINGLE} nor {INDEX}")


def _index(path: Path) -> tuple[Path, dict[str, str], dict[str, Any]]:
    try:
        content = parse(path.read_bytes())
        weight_map, metadata = content["weight_map"], content.get("metadata") or {}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a safetensors index ({error!r})") from None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path}: the weight_map is not a table of file names")
    return path, weight_map, metadata


def _plain(owner: Path, name: str) -> str:
    """``name`` if it stays inside the directory: a checkpoint must not make us read other files."""
    if not name.endswith(".safetensors") or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{owner}: {name!r} is not a safetensors file of this directory")
    return name


def _merge(files: tuple[Path, ...]) -> dict[str, Segment]:
    tensors: dict[str, Segment] = {}
    for path in files:
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is also in {tensors[name].path}")
            tensors[name] = tensor
    return tensors


def _check_map(index: Path, weight_map: dict[str, str], tensors: dict[str, Segment]) -> None:
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{index}: names tensor {name!r} in {shard}, which does not hold it")
        if Path(tensors[name].path).name != Path(shard).name:
            raise CheckpointError(f"{index}: names tensor {name!r} in {shard}, but it is in {tensors[name].path}")
