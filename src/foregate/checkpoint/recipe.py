"""How one parameter of one expert is made from the bytes of its tensors, with transformers' own operations.

Shapes: E experts of a layer. An operation that leaves dimension 0 alone gives the same bytes for one expert as for E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from foregate.checkpoint.dtypes import FLOATS
from foregate.checkpoint.reason import reason
from foregate.errors import CheckpointError, UnsupportedModelError
from foregate.types import ParamLayout, Segment

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """What one source pattern names: E tensors, one an expert, or a single fused tensor [E, ...]."""

    pattern: str
    tensors: tuple[Segment, ...]
    fused: bool

    @property
    def shape(self) -> Shape:
        """Shape of one expert's part."""
        return self.tensors[0].shape[1:] if self.fused else self.tensors[0].shape

    @property
    def largest(self) -> int:
        """Bytes of the largest part of one expert; they differ only where a checkpoint mixes dtypes."""
        if self.fused:
            return self.segment(0).nbytes
        return max(tensor.nbytes for tensor in self.tensors)

    def segment(self, expert: int) -> Segment:
        """Where the part of ``expert`` lies."""
        if not self.fused:
            return self.tensors[expert]
        whole = self.tensors[0]
        nbytes = whole.nbytes // whole.shape[0]
        return Segment(whole.path, whole.tensor, whole.offset + expert * nbytes, nbytes, whole.dtype, whole.shape[1:])


@dataclass(frozen=True, slots=True)
class Recipe:
    """One parameter of every expert of a layer. Without ``steps`` it is the parts of its sources, one after another."""

    layout: ParamLayout
    sources: tuple[Source, ...]
    steps: tuple[ConversionOps, ...]
    patterns: tuple[str, ...]
    targets: tuple[str, ...]

    @property
    def copies(self) -> bool:
        """True where assembling is copying bytes."""
        return not self.steps and all(t.dtype == self.layout.dtype for s in self.sources for t in s.tensors)

    def make(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parameter from the parts of one expert, one a source, each in the shape and dtype of the file."""
        dtype = FLOATS[self.layout.dtype]
        cast = [part.to(dtype) for part in parts]
        if not self.steps:
            return torch.cat([part.reshape(-1) for part in cast]).view(self.layout.shape)
        tensors: dict[str, Any] = {
            source.pattern: [part.unsqueeze(0) if source.fused else part]
            for source, part in zip(self.sources, cast, strict=True)
        }
        return _run(self.steps, tensors, self.patterns, self.targets).squeeze(0)


def plan(
    param: ParamLayout, experts: int, sources: tuple[Source, ...], converter: WeightConverter | None, family: str
) -> Recipe:
    """The recipe for ``param`` from ``sources``, after trying it with shapes alone.

    Raises UnsupportedModelError for an operation that may mix experts, CheckpointError where the shapes do not fit.
    """
    if converter is None:
        operations, patterns, targets = [], [sources[0].pattern], [param.name]
    else:
        operations, patterns, targets = converter.operations, converter.source_patterns, converter.target_patterns
    ordered = tuple(sorted(sources, key=lambda source: patterns.index(source.pattern)))
    steps, shape = _try(operations, ordered, patterns, targets, param.shape, experts, family)
    if shape != (experts, *param.shape):
        found = ", ".join(f"{source.tensors[0].tensor} {list(source.tensors[0].shape)}" for source in ordered)
        message = f"{ordered[0].tensors[0].path}: {found} gives {list(shape)}, but {param.name} of {family} is"
        raise CheckpointError(f"{message} {[experts, *param.shape]}")
    return Recipe(param, ordered, () if _only_copies(steps) else steps, tuple(patterns), tuple(targets))


def _try(
    operations: Sequence[ConversionOps],
    sources: tuple[Source, ...],
    patterns: Sequence[str],
    targets: Sequence[str],
    wanted: Shape,
    experts: int,
    family: str,
) -> tuple[tuple[ConversionOps, ...], Shape]:
    """The operations that apply, and the shape they give for all E experts together."""
    tensors: dict[str, Any] = {}
    for source in sources:
        meta = [torch.empty(t.shape, device="meta", dtype=torch.float32) for t in source.tensors]
        tensors[source.pattern] = meta
    steps: list[ConversionOps] = []
    for operation in operations:
        _check_allowed(operation, family)
        if isinstance(operation, Transpose) and operation.check_dims:
            # transformers transposes only where the shape is not the model's already
            if _single(tensors).shape == (experts, *wanted):
                continue
            operation = Transpose(operation.dim0, operation.dim1)
        tensors = _apply(operation, tensors, patterns, targets, sources)
        steps.append(operation)
    return tuple(steps), tuple(_single(tensors).shape)


def _check_allowed(operation: ConversionOps, family: str) -> None:
    dims = {
        MergeModulelist: lambda op: op.dim == 0,
        Concatenate: lambda op: op.dim >= 1,
        Transpose: lambda op: op.dim0 >= 1 and op.dim1 >= 1,
        Interleave: lambda op: op.dim >= 1,
    }
    keeps_experts_apart = dims.get(type(operation))
    if keeps_experts_apart is None or not keeps_experts_apart(operation):
        raise UnsupportedModelError(
            f"model type {family!r} converts its experts with {operation!r}, which is not supported"
        )


def _apply(
    operation: ConversionOps,
    tensors: dict[str, Any],
    patterns: Sequence[str],
    targets: Sequence[str],
    sources: tuple[Source, ...],
) -> dict[str, Any]:
    try:
        return operation.convert(tensors, source_patterns=list(patterns), target_patterns=list(targets))
    except (RuntimeError, ValueError, IndexError) as error:
        first = sources[0].tensors[0]
        message = f"{first.path}: {first.tensor} {list(first.shape)}: {operation!r} fails"
        raise CheckpointError(f"{message}: {reason(error)}") from error


def _run(
    steps: Sequence[ConversionOps], tensors: dict[str, Any], patterns: Sequence[str], targets: Sequence[str]
) -> torch.Tensor:
    for operation in steps:
        tensors = operation.convert(tensors, source_patterns=list(patterns), target_patterns=list(targets))
    return _single(tensors)


def _single(tensors: dict[str, Any]) -> torch.Tensor:
    value = next(iter(tensors.values()))
    result: torch.Tensor = value[0] if isinstance(value, list) else value
    return result


def _only_copies(steps: Sequence[ConversionOps]) -> bool:
    """Stacking, and joining along the first dimension of one expert: its bytes one after another, nothing else."""
    return all(isinstance(step, MergeModulelist) or (isinstance(step, Concatenate) and step.dim == 1) for step in steps)
