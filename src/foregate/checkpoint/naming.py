"""Tensor → ExpertKey: which bytes of which file make up every expert, for any family that transformers can load.

Shapes: E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers.core_model_loading import MergeModulelist

from foregate.checkpoint.dense import check_dense
from foregate.checkpoint.dtypes import FLOATS, spelling
from foregate.checkpoint.layout import lay_out
from foregate.checkpoint.numbering import by_expert
from foregate.checkpoint.recipe import Recipe, Source, plan
from foregate.checkpoint.renaming import Renamed, Target, rename
from foregate.checkpoint.shards import Shards
from foregate.checkpoint.skeleton import ExpertsModule, Skeleton
from foregate.errors import CheckpointError
from foregate.types import ExpertKey, ExpertLayout, Segment


@dataclass(frozen=True, slots=True)
class LayerSources:
    """The experts of one MoE layer: module ``path``, E = ``experts``, slot layout, and a recipe for each parameter."""

    path: str
    experts: int
    layout: ExpertLayout
    recipes: tuple[Recipe, ...]

    def segments(self, expert: int) -> tuple[Segment, ...]:
        """The byte ranges of one expert, in the order in which ``assemble`` wants them. Raises IndexError."""
        if not 0 <= expert < self.experts:
            raise IndexError(f"{self.path} has no expert {expert}, only {self.experts}")
        return tuple(source.segment(expert) for recipe in self.recipes for source in recipe.sources)


@dataclass(frozen=True, slots=True)
class ExpertSources:
    """Where every expert of an original checkpoint lies. ``dense`` and ``unused`` are names of the other tensors."""

    layers: tuple[LayerSources, ...]
    dense: tuple[str, ...]
    unused: tuple[str, ...]

    def segments(self, key: ExpertKey) -> tuple[Segment, ...]:
        """The byte ranges that make up ``key``. Raises IndexError for a key that the model does not have."""
        return self.layers[key.layer].segments(key.expert)


def find_sources(skeleton: Skeleton, shards: Shards) -> ExpertSources:
    """Map the tensors of ``shards`` to experts.

    Raises CheckpointError naming what is missing, doubled, or of a wrong dtype or shape; UnsupportedModelError naming
    the family for a conversion that cannot be done expert by expert.
    """
    renamed = rename(skeleton.model, shards.tensors)
    layers = tuple(_layer(module, layout, renamed, skeleton, shards.tensors) for module, layout in layouts(skeleton))
    taken = {t.tensor for layer in layers for r in layer.recipes for s in r.sources for t in s.tensors}
    used = {name for target in renamed.targets.values() for names in target.sources.values() for name in names}
    dense = tuple(name for name in shards.tensors if name in used and name not in taken)
    check_dense(skeleton.model.state_dict(), renamed, shards.tensors, dense)
    return ExpertSources(layers, dense, renamed.unused)


def layouts(skeleton: Skeleton) -> list[tuple[ExpertsModule, ExpertLayout]]:
    """Every MoE layer with the layout of its experts; parameters in module order, in the dtype they are loaded in."""
    found = []
    for module in skeleton.moe:
        params = []
        for name, param in module.params.items():
            dtype = skeleton.loaded_dtype(f"{module.path}.{name}", param)
            params.append((name, spelling(dtype), tuple(param.shape[1:])))
        found.append((module, lay_out(params)))
    return found


def _layer(
    module: ExpertsModule, layout: ExpertLayout, renamed: Renamed, skeleton: Skeleton, tensors: Mapping[str, Segment]
) -> LayerSources:
    recipes = []
    for param in layout.params:
        target = renamed.targets.get(f"{module.path}.{param.name}")
        if target is None:
            message = f"no tensor of the checkpoint gives {module.path}.{param.name}"
            raise CheckpointError(
                f"{message}: all {module.experts} experts of decoder layer {module.layer} are missing"
            )
        sources = _sources(target, module.experts, tensors)
        recipes.append(plan(param, module.experts, sources, target.converter, skeleton.config.model_type))
    return LayerSources(module.path, module.experts, layout, tuple(recipes))


def _sources(target: Target, experts: int, tensors: Mapping[str, Segment]) -> tuple[Source, ...]:
    merges = target.converter is not None and isinstance(target.converter.operations[0], MergeModulelist)
    if target.converter is not None:
        for pattern in target.converter.source_patterns:
            if pattern not in target.sources:
                raise CheckpointError(f"{target.parameter}: no tensor of the checkpoint matches {pattern!r}")
    found = []
    for pattern, names in target.sources.items():
        for name in names:
            _check_dtype(tensors[name])
        if merges:
            names = by_expert(names, experts, target.parameter)
        elif len(names) != 1:
            raise CheckpointError(f"{target.parameter}: more than one tensor for it: {', '.join(names)}")
        segments = tuple(tensors[name] for name in names)
        _check_shapes(segments, experts, merges)
        found.append(Source(pattern, segments, fused=not merges))
    return tuple(found)


def _check_dtype(tensor: Segment) -> None:
    if tensor.dtype not in FLOATS:
        message = f"{tensor.path}: expert tensor {tensor.tensor!r} is {tensor.dtype}; supported: {', '.join(FLOATS)}"
        raise CheckpointError(f"{message} (quantised weights have to be dequantised first)")


def _check_shapes(segments: tuple[Segment, ...], experts: int, merges: bool) -> None:
    first = segments[0]
    if not merges and (not first.shape or first.shape[0] != experts):
        raise CheckpointError(f"{first.path}: {first.tensor} {list(first.shape)} is not for {experts} experts")
    for segment in segments:
        if segment.shape != first.shape:
            message = (
                f"{segment.path}: {segment.tensor} is {list(segment.shape)}, {first.tensor} is {list(first.shape)}"
            )
            raise CheckpointError(message)
