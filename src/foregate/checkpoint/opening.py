"""A checkpoint directory, original or packed, opened from its headers: what it is and where every expert lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from foregate.checkpoint.fingerprint import fingerprint
from foregate.checkpoint.model_config import model_dtype, read_config, text_config
from foregate.checkpoint.naming import ExpertSources, find_sources
from foregate.checkpoint.shards import Shards, read_shards
from foregate.checkpoint.skeleton import Skeleton, build_skeleton
from foregate.checkpoint.spec import MoeSpec, make_spec
from foregate.errors import CheckpointError
from foregate.types import ExpertLayout, Segment


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything about a checkpoint but its weights.

    ``layouts`` has one entry a MoE layer. ``dense`` are the tensors outside the experts that the model has parameters
    for. ``sources`` is None for a pack.
    """

    directory: Path
    spec: MoeSpec
    fingerprint: str
    skeleton: Skeleton
    layouts: tuple[ExpertLayout, ...]
    shards: Shards
    dense: Mapping[str, Segment]
    sources: ExpertSources | None

    @property
    def packed(self) -> bool:
        return self.sources is None


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open the directory ``path`` (see ``locate`` for names). Reads no weight.

    Raises CheckpointError or UnsupportedModelError, in one line that names the file, tensor or model type.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    return _open_original(directory)


def _open_original(directory: Path) -> Checkpoint:
    raw = read_config(directory)
    config = text_config(directory, raw)
    shards = read_shards(directory, raw.get("transformers_weights"))
    skeleton = build_skeleton(config, model_dtype(config, shards))
    sources = find_sources(skeleton, shards)
    dense = {name: shards.tensors[name] for name in sources.dense}
    found = tuple(layer.layout for layer in sources.layers)
    spec = make_spec(skeleton, found, dense.values())
    return Checkpoint(
        directory=directory,
        spec=spec,
        fingerprint=fingerprint(raw, shards.tensors.values()),
        skeleton=skeleton,
        layouts=found,
        shards=shards,
        dense=dense,
        sources=sources,
    )
