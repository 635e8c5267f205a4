"""A checkpoint directory, original or packed, opened from its headers: what it is and where every expert lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from foregate.checkpoint.dense import check_dense
from foregate.checkpoint.dense_int8 import SCALE, replace_linears
from foregate.checkpoint.dtypes import FLOATS
from foregate.checkpoint.fingerprint import fingerprint
from foregate.checkpoint.generation import check_generation_config
from foregate.checkpoint.manifest import EXPERTS_FILE, NAME, Manifest, is_pack, read_manifest
from foregate.checkpoint.model_config import model_dtype, read_config, text_config
from foregate.checkpoint.naming import ExpertSources, find_sources, layouts
from foregate.checkpoint.packplan import ExpertsPlan, plan_experts
from foregate.checkpoint.precision import AS_SOURCE, Precision
from foregate.checkpoint.renaming import rename
from foregate.checkpoint.shards import Shards, read_shards
from foregate.checkpoint.skeleton import Skeleton, build_skeleton
from foregate.checkpoint.spec import MoeSpec, make_spec
from foregate.errors import CheckpointError, PackError
from foregate.types import ExpertKey, ExpertLayout, Segment


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything about a checkpoint but its weights.

    ``layouts`` has one entry a MoE layer, ``kept_layouts`` too: for the experts that a pack of mixed precision keeps
    finer (elsewhere the same objects). ``dense`` are the tensors outside the experts that the model has parameters
    for. An original has ``sources``, a pack has a ``manifest``; the other one is None.
    """

    directory: Path
    spec: MoeSpec
    fingerprint: str
    skeleton: Skeleton
    layouts: tuple[ExpertLayout, ...]
    shards: Shards
    dense: Mapping[str, Segment]
    sources: ExpertSources | None
    manifest: Manifest | None
    kept_layouts: tuple[ExpertLayout, ...] = ()

    @property
    def precision(self) -> Precision:
        """Everything as the source has it, but in a quantised pack."""
        return AS_SOURCE if self.manifest is None else self.manifest.precision

    def layout_of(self, key: ExpertKey) -> ExpertLayout:
        """The slot layout of ``key``."""
        kept = key in self.precision.kept_experts
        return self.kept_layouts[key.layer] if kept else self.layouts[key.layer]

    @property
    def packed(self) -> bool:
        return self.manifest is not None


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open the directory ``path`` (see ``locate`` for names). Reads no weight but the samples of its fingerprint.

    Raises CheckpointError or UnsupportedModelError, in one line that names the file, tensor or model type.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    check_generation_config(directory)
    return _open_pack(directory) if is_pack(directory) else _open_original(directory)


def _open_original(directory: Path) -> Checkpoint:
    raw = read_config(directory)
    config = text_config(directory, raw)
    shards = read_shards(directory, raw.get("transformers_weights"))
    skeleton = build_skeleton(config, model_dtype(config, shards))
    sources = find_sources(skeleton, shards)
    dense = {name: shards.tensors[name] for name in sources.dense}
    found = tuple(layer.layout for layer in sources.layers)
    spec = make_spec(skeleton, lambda key: found[key.layer])
    return Checkpoint(
        directory=directory,
        spec=spec,
        fingerprint=fingerprint(raw, shards.tensors.values()),
        skeleton=skeleton,
        layouts=found,
        shards=shards,
        dense=dense,
        sources=sources,
        manifest=None,
    )


def _open_pack(directory: Path) -> Checkpoint:
    manifest = read_manifest(directory)
    skeleton = build_skeleton(text_config(directory, read_config(directory)), _dtype(manifest))
    shards = read_shards(directory)
    if manifest.precision.dense.bits:
        replace_linears(skeleton.model, _int8_weights(shards))
    _check_experts_file(directory, manifest)
    placed = [(module, *manifest.precision.layouts(module, layout)) for module, layout in layouts(skeleton)]
    expected = [(module.path, module.experts, *both) for module, *both in placed]
    if expected != [(x.path, len(x.experts), x.layout, x.kept_layout) for x in manifest.layers]:
        message = f"{directory}: packed with transformers {manifest.transformers_version}, which lays experts out"
        raise PackError(f"{message} differently from the one installed; pack the model again")
    _check_places(directory, manifest)
    check_dense(skeleton.model.state_dict(), rename(skeleton.model, shards.tensors), shards.tensors, shards.tensors)
    return Checkpoint(
        directory=directory,
        spec=make_spec(skeleton, manifest.layout_of),
        fingerprint=manifest.fingerprint,
        skeleton=skeleton,
        layouts=tuple(ordinary for _, ordinary, _ in placed),
        kept_layouts=tuple(kept for _, _, kept in placed),
        shards=shards,
        dense=shards.tensors,
        sources=None,
        manifest=manifest,
    )


def _dtype(manifest: Manifest) -> torch.dtype:
    if manifest.dtype not in FLOATS:
        raise PackError(f"the pack has dtype {manifest.dtype!r}; supported: {', '.join(FLOATS)}")
    return FLOATS[manifest.dtype]


def _int8_weights(shards: Shards) -> list[str]:
    found = (name.removesuffix(SCALE) for name in shards.tensors if name.endswith(f".weight{SCALE}"))
    return [name for name in found if name in shards.tensors and shards.tensors[name].dtype == "I8"]


def plan_of(manifest: Manifest) -> ExpertsPlan:
    """The experts file as it must be, from the layouts that ``manifest`` states."""
    layers = manifest.layers
    return plan_experts([x.path for x in layers], manifest.orders, manifest.layout_of)


def _check_places(directory: Path, manifest: Manifest) -> None:
    """Everything about the experts file follows from the layouts: a manifest that says otherwise is not ours."""
    plan = plan_of(manifest)
    for planned in plan.experts:
        said = manifest.find(planned.key)
        if (said.offset, said.nbytes) != (planned.offset, planned.nbytes):
            name = f"expert {planned.key.expert} of MoE layer {planned.key.layer}"
            message = f"{directory / NAME}: damaged: {name} has {said.nbytes} bytes at byte {said.offset}"
            raise PackError(
                f"{message} instead of {planned.nbytes} at byte {planned.offset}; remove the pack and pack again"
            )
    if manifest.experts_nbytes != plan.nbytes:
        message = f"{directory / NAME}: damaged: {EXPERTS_FILE} has {manifest.experts_nbytes} bytes"
        raise PackError(f"{message} instead of {plan.nbytes}; remove the pack and pack again")


def _check_experts_file(directory: Path, manifest: Manifest) -> None:
    path = directory / EXPERTS_FILE
    if not path.is_file():
        raise PackError(f"{path}: file is missing")
    size = path.stat().st_size
    if size != manifest.experts_nbytes:
        raise PackError(f"{path}: truncated or changed: expected {manifest.experts_nbytes} bytes, found {size}")
