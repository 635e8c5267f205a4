"""Tensor name → how it is inflated. One rule for each kind of tensor of the supported families."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from foregate.checkpoint.dtypes import BITS, FLOATS
from foregate.checkpoint.opening import Checkpoint
from foregate.errors import CheckpointError
from foregate.testing.inflate_axes import Axis, axes, same
from foregate.testing.inflate_sizes import Inflation
from foregate.types import Segment

SAME = "same"
"""In a rule: this dimension keeps its length."""

RULES = (
    (r"embed_tokens\.weight", (SAME, "residual"), False),
    (r"lm_head\.weight", (SAME, "input"), False),
    (r"(.*\.)?(input_layernorm|post_attention_layernorm|norm)\.weight", ("norm",), True),
    (r"self_attn\.(q|k)_proj\.weight", (r"\1", "input"), True),
    (r"self_attn\.(q|k)_proj\.bias", (r"\1",), True),
    (r"self_attn\.v_proj\.weight", ("v", "input"), False),
    (r"self_attn\.v_proj\.bias", ("v",), False),
    (r"self_attn\.o_proj\.weight", ("residual", "o"), False),
    (r"self_attn\.o_proj\.bias", ("residual",), False),
    (r"self_attn\.[qk]_norm\.weight", (SAME,), False),
    (r"mlp\.(gate|shared_expert_gate)\.weight", (SAME, "input"), False),
    (r"mlp\.experts\.\d+\.(gate|up)_proj\.weight", (r"expert.\1", "input"), False),
    (r"mlp\.experts\.\d+\.down_proj\.weight", ("residual", "expert.down"), False),
    (r"mlp\.shared_expert\.(gate|up)_proj\.weight", (r"shared.\1", "input"), False),
    (r"mlp\.shared_expert\.down_proj\.weight", ("residual", "shared.down"), False),
    (r"mlp\.(gate|up)_proj\.weight", (r"dense.\1", "input"), False),
    (r"mlp\.down_proj\.weight", ("residual", "dense.down"), False),
)
"""Name after ``model.`` and ``layers.N.``; the axis of each dimension; whether values are divided by 2^shift.

Norm weights undo that 1/rms is larger. Queries and keys, where they are normed, are divided like the residual's rms,
because their norms share the epsilon that had to shrink.
"""

_PREFIX = re.compile(r"^(model\.)?(layers\.\d+\.)?")


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor to write: the original's bytes, the axis of every dimension, and log2 of the divisor."""

    source: Segment
    axes: tuple[Axis, ...]
    shift: int

    @property
    def name(self) -> str:
        return self.source.tensor

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self.axes)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8

    @property
    def zeros(self) -> int:
        """How many elements have to be zero."""
        return math.prod(axis.bound for axis in self.axes) - math.prod(axis.carried for axis in self.axes)


def plan(checkpoint: Checkpoint, inflation: Inflation) -> list[Planned]:
    """Every tensor of the inflated checkpoint, in the order of the original's files.

    Raises CheckpointError naming a tensor that no rule covers, or whose shape is not the config's.
    """
    known = axes(inflation)
    return [_planned(tensor, inflation, known) for tensor in _used(checkpoint, inflation)]


def expert_zero_share(planned: list[Planned]) -> float:
    """Share of an expert's weights that have to be zero, over all routed experts."""
    mine = [tensor for tensor in planned if ".mlp.experts." in tensor.name]
    return sum(tensor.zeros for tensor in mine) / sum(math.prod(tensor.shape) for tensor in mine)


def _used(checkpoint: Checkpoint, inflation: Inflation) -> Iterator[Segment]:
    """What the model has parameters for; an output head that is tied has none of its own."""
    assert checkpoint.sources is not None, "packs are refused by sizes_of"
    unused = set(checkpoint.sources.unused)
    for name, tensor in checkpoint.shards.tensors.items():
        if name not in unused and not (inflation.tied and name == "lm_head.weight"):
            yield tensor


def _planned(tensor: Segment, inflation: Inflation, known: Mapping[str, Axis]) -> Planned:
    names, scaled = _rule(tensor)
    found = tuple(
        same(length) if name == SAME else known[name] for name, length in zip(names, tensor.shape, strict=True)
    )
    if any(axis.before != length for axis, length in zip(found, tensor.shape, strict=True)):
        wanted = [axis.before for axis in found]
        raise CheckpointError(f"{tensor.path}: {tensor.tensor} is {list(tensor.shape)}, config.json says {wanted}")
    if tensor.dtype not in FLOATS:
        message = f"{tensor.path}: {tensor.tensor} is {tensor.dtype}; supported: {', '.join(FLOATS)}"
        raise CheckpointError(message)
    divided = scaled and (inflation.qk_norm or "self_attn." not in tensor.tensor)
    return Planned(tensor, found, inflation.shift if divided else 0)


def _rule(tensor: Segment) -> tuple[tuple[str, ...], bool]:
    short = _PREFIX.sub("", tensor.tensor)
    for pattern, names, scaled in RULES:
        match = re.fullmatch(pattern, short)
        if match and len(names) == len(tensor.shape):
            return tuple(match.expand(name) for name in names), scaled
    raise CheckpointError(f"{tensor.path}: no rule inflates tensor {tensor.tensor!r} {list(tensor.shape)}")
