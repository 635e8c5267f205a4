"""Which tensors of a Qwen3-MoE checkpoint become which tensors of its GGUF file.

Stored tensors are [rows, columns] as in the checkpoint, experts stacked in front; GGUF counts dimensions backwards,
which its library does.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from foregate.bench.rivals.gguf_settings import FAMILY, experts_of
from foregate.checkpoint.shards import Shards
from foregate.errors import CheckpointError, UnsupportedModelError
from foregate.types import Segment

_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_ROUTER = re.compile(r"model\.layers\.\d+\.mlp\.gate\.weight")
_FLOATS = {"F32": np.float32, "F16": np.float16}


@dataclass(frozen=True, slots=True)
class Fused:
    """One tensor of the file: ``parts`` are the experts' in their order, or the one that it is."""

    name: str
    type: GGMLQuantizationType
    parts: Sequence[Segment]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        one = self.parts[0].shape
        return (len(self.parts), *one) if self.stacked else one

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Of the array that is written: bytes, unless numpy knows the type."""
        known = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        return np.dtype(known.get(self.type, np.uint8))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        if self.stored_dtype != np.uint8:
            return self.shape
        block, nbytes = GGML_QUANT_SIZES[self.type]
        return (*self.shape[:-1], self.shape[-1] // block * nbytes)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.stored_shape)) * self.stored_dtype.itemsize


def plan(
    raw: dict[str, Any], shards: Shards, expert_type: GGMLQuantizationType, dense_type: GGMLQuantizationType
) -> list[Fused]:
    """Every tensor of the file, in the order in which a pass through the model needs them.

    Raises UnsupportedModelError naming a tensor that has no place there, CheckpointError for one that is missing.
    """
    names = gguf.get_tensor_name_map(FAMILY, raw["num_hidden_layers"])
    tied = bool(raw.get("tie_word_embeddings"))
    experts: dict[str, dict[int, Segment]] = defaultdict(dict)
    found = []
    for name, segment in shards.tensors.items():
        expert = _EXPERT.fullmatch(name)
        if expert:
            layer, index, kind = expert.groups()
            experts[f"blk.{layer}.ffn_{kind}_exps.weight"][int(index)] = segment
        elif not (tied and name == "lm_head.weight"):
            found.append(_dense(names, name, segment, dense_type))
    found += [_stack(name, parts, experts_of(raw), expert_type) for name, parts in experts.items()]
    _check_complete(found, names, raw["num_hidden_layers"], tied)
    return sorted(found, key=lambda tensor: _place(tensor.name))


def _dense(names: gguf.TensorNameMap, name: str, segment: Segment, dense_type: GGMLQuantizationType) -> Fused:
    target = names.get_name(name, try_suffixes=(".weight",))
    if target is None:
        raise UnsupportedModelError(f"{segment.path}: tensor {name!r} has no place in a GGUF file of a Qwen3-MoE")
    plain = len(segment.shape) == 1 or _ROUTER.fullmatch(name)
    return _checked(Fused(target, GGMLQuantizationType.F32 if plain else dense_type, [segment], stacked=False))


def _stack(name: str, parts: dict[int, Segment], experts: int, expert_type: GGMLQuantizationType) -> Fused:
    lacking = sorted(set(range(experts)) ^ set(parts))
    if lacking:
        raise CheckpointError(f"{name}: the checkpoint lacks, or has too many, experts: {lacking[:8]} of {experts}")
    ordered = [parts[index] for index in range(experts)]
    if len({part.shape for part in ordered}) != 1:
        raise CheckpointError(f"{name}: experts of different shapes: {sorted({part.shape for part in ordered})}")
    return _checked(Fused(name, expert_type, ordered, stacked=True))


def _checked(tensor: Fused) -> Fused:
    block = GGML_QUANT_SIZES[tensor.type][0]
    if tensor.shape[-1] % block:
        said = f"rows of {tensor.shape[-1]} values are no multiple of {block}"
        raise UnsupportedModelError(f"{tensor.parts[0].tensor}: {said}, which {tensor.type.name} needs")
    strange = sorted({part.dtype for part in tensor.parts} - {*_FLOATS, "BF16"})
    if strange:
        raise UnsupportedModelError(f"{tensor.parts[0].tensor}: dtype {strange[0]}; supported: BF16, F16, F32")
    return tensor


def _check_complete(found: list[Fused], names: gguf.TensorNameMap, layers: int, tied: bool) -> None:
    wanted = set()
    for kind in gguf.MODEL_TENSORS[FAMILY]:
        if kind is gguf.MODEL_TENSOR.OUTPUT and tied:
            continue
        pattern = gguf.TENSOR_NAMES[kind]
        wanted |= {f"{pattern.format(bid=layer)}.weight" for layer in range(layers)}
    missing = sorted(wanted - {tensor.name for tensor in found})
    if missing:
        raise CheckpointError(f"the checkpoint has nothing for {missing[0]} ({len(missing)} tensors are missing)")


def _place(name: str) -> tuple[int, str]:
    """Embedding, layer after layer, then the rest."""
    found = re.match(r"blk\.(\d+)\.", name)
    return (int(found[1]) if found else -1 if name.startswith("token_embd") else 1 << 30, name)


def floats(segment: Segment) -> NDArray[np.float32]:
    """The weights of ``segment`` in fp32, in its shape; what was read leaves the page cache again."""
    with Path(segment.path).open("rb") as file:
        raw = os.pread(file.fileno(), segment.nbytes, segment.offset)
        os.posix_fadvise(file.fileno(), segment.offset, segment.nbytes, os.POSIX_FADV_DONTNEED)
    if len(raw) != segment.nbytes:
        raise CheckpointError(f"{segment.path}: truncated in tensor {segment.tensor!r}")
    if segment.dtype == "BF16":
        wide = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(segment.shape)
    return np.frombuffer(raw, _FLOATS[segment.dtype]).astype(np.float32, copy=False).reshape(segment.shape)
