"""What the hooks of one forward pass have seen, still as tensors, and how passes become a record.

Shapes: B sequences, T tokens of a pass, R = B x T rows, L MoE layers, k chosen, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foregate.errors import TraceError
from foregate.trace import format as fmt
from foregate.trace.record import PromptRecord

Array = NDArray[Any]


@dataclass(slots=True)
class LayerCapture:
    """One MoE layer in one pass: ``index``, ``weights`` [R, k], ``scores`` [R, E], ``features`` [R, D], nanoseconds."""

    index: Tensor | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    timings: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class PassCapture:
    """One forward pass. ``token_ids`` [B, T] (None: embeddings were given), ``positions`` [B, T], ``kept`` [B, T]."""

    shape: tuple[int, int]
    token_ids: Tensor | None
    positions: Tensor
    kept: Tensor
    layers: list[LayerCapture]

    @property
    def rows(self) -> int:
        """R."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be recorded besides the choice. ``top_k`` and ``experts`` have one entry a MoE layer."""

    family: str
    experts: Sequence[int]
    scores: bool
    features: tuple[str, ...]
    timings: tuple[str, ...]


def begin_pass(args: tuple[Any, ...], kwargs: dict[str, Any], layers: int) -> PassCapture:
    """A new capture from the arguments of the model's forward: shape, token ids, positions and padding."""
    ids = args[0] if args else kwargs.get("input_ids")
    embedded = kwargs.get("inputs_embeds")
    given = ids if ids is not None else embedded
    if not isinstance(given, Tensor):
        raise TraceError("a forward pass with neither input_ids nor inputs_embeds cannot be traced")
    batch, tokens = int(given.shape[0]), int(given.shape[1])
    return PassCapture(
        shape=(batch, tokens),
        token_ids=None if ids is None else ids.detach().clone(),
        positions=_positions(kwargs, batch, tokens),
        kept=_kept(kwargs.get("attention_mask"), batch, tokens),
        layers=[LayerCapture() for _ in range(layers)],
    )


def _positions(kwargs: dict[str, Any], batch: int, tokens: int) -> Tensor:
    given = kwargs.get("position_ids")
    if isinstance(given, Tensor) and given.dim() == 2 and given.shape[1] == tokens:
        return given.detach().clone().expand(batch, tokens)
    length = getattr(kwargs.get("past_key_values"), "get_seq_length", None)
    before = int(length()) if length is not None else 0
    return torch.arange(before, before + tokens).expand(batch, tokens)


def _kept(mask: Any, batch: int, tokens: int) -> Tensor:
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= tokens:
        return mask[:, -tokens:].detach().bool().clone()
    return torch.ones(batch, tokens, dtype=torch.bool)


def to_record(passes: Sequence[PassCapture], sequence: int, prompt: str, domain: str, wanted: Wanted) -> PromptRecord:
    """The rows of ``sequence`` (0 … B-1) of all ``passes``, in order, padding left out."""
    keep = np.concatenate([_numpy(one.kept[sequence]) for one in passes]).astype(bool)
    tokens = [one.shape[1] for one in passes]
    positions = np.concatenate([_numpy(one.positions[sequence]) for one in passes])[keep]
    first = np.cumsum([0, *tokens[:-1]])
    single = np.repeat(np.array(tokens) == 1, tokens)[keep]

    def column(layer: int, name: str) -> list[Tensor | None]:
        return [_rows(getattr(one.layers[layer], name), one, sequence) for one in passes]

    layers = range(len(wanted.experts))
    index = [_join(column(layer, "index"), keep) for layer in layers]
    weights = [_join(column(layer, "weights"), keep) for layer in layers]
    pad = fmt.padding(fmt.expert_dtype(max(wanted.experts)))
    return PromptRecord(
        prompt=prompt,
        domain=domain,
        positions=positions,
        token_ids=np.concatenate([_token_ids(one, sequence) for one in passes])[keep],
        decode=single & (positions > 0),
        passes=np.repeat(np.arange(len(passes)), tokens)[keep],
        experts=_stack(index, pad),
        weights=_stack(weights, np.nan),
        scores=_scores([column(layer, "scores") for layer in layers], keep) if wanted.scores else None,
        timings={name: _timings(passes, name, first, keep) for name in wanted.timings},
        features={name: _feature(passes, sequence, name, keep) for name in wanted.features},
    )


def _rows(values: Tensor | None, one: PassCapture, sequence: int) -> Tensor | None:
    """Of [R, …], those of ``sequence``."""
    if values is None:
        return None
    tokens = one.shape[1]
    return values[sequence * tokens : (sequence + 1) * tokens]


def _join(parts: Sequence[Tensor | None], keep: Array) -> Array:
    present = [part for part in parts if part is not None]
    assert len(present) == len(parts), "a layer without a choice ended its pass"
    return _numpy(torch.cat(present))[keep]


def _stack(layers: Sequence[Array], pad: float) -> Array:
    """L arrays [T, k of the layer] → [T, L, largest k], padded."""
    width = max(layer.shape[1] for layer in layers)
    out = np.full((len(layers[0]), len(layers), width), pad, dtype=np.result_type(*layers))
    for number, layer in enumerate(layers):
        out[:, number, : layer.shape[1]] = layer
    return out


def _scores(layers: Sequence[Sequence[Tensor | None]], keep: Array) -> Array:
    """[T, L, S] with S the widest; NaN for a layer whose router gives none."""
    empty = np.full((int(keep.sum()), 1), np.nan, np.float32)
    return _stack([empty if any(part is None for part in parts) else _join(parts, keep) for parts in layers], np.nan)


def _timings(passes: Sequence[PassCapture], name: str, first: Array, keep: Array) -> Array:
    """[T, L]: of each pass in the row of its first token that is kept."""
    out = np.full((len(keep), len(passes[0].layers)), fmt.NOT_MEASURED, np.int64)
    for one, begin in zip(passes, first, strict=True):
        row = begin + int(np.argmax(keep[begin : begin + one.shape[1]]))
        out[row] = [layer.timings.get(name, fmt.NOT_MEASURED) for layer in one.layers]
    return out[keep]


def _feature(passes: Sequence[PassCapture], sequence: int, name: str, keep: Array) -> Array:
    """[T, L, D] as float16, or as the bits of bfloat16; NaN in layers without this feature."""
    layers = [
        [_rows(one.layers[layer].features.get(name), one, sequence) for one in passes]
        for layer in range(len(passes[0].layers))
    ]
    example = next(part for parts in layers for part in parts if part is not None)
    blank = example.new_full((len(keep), example.shape[1]), torch.nan)
    joined = [_joined(parts, blank) for parts in layers]
    stacked = torch.stack(joined, dim=1).cpu()[torch.from_numpy(keep)]
    if torch.isinf(stacked).any():
        raise TraceError(f"feature {name} does not fit in {str(stacked.dtype)[6:]}; record it as bfloat16")
    return _bits(stacked)


def _joined(parts: Sequence[Tensor | None], blank: Tensor) -> Tensor:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if len(present) == len(parts) else blank


def _token_ids(one: PassCapture, sequence: int) -> Array:
    if one.token_ids is None:
        return np.full(one.shape[1], fmt.UNKNOWN_TOKEN)
    return _numpy(one.token_ids[sequence])


def _bits(values: Tensor) -> Array:
    if values.dtype == torch.bfloat16:
        return np.asarray(values.contiguous().view(torch.int16).numpy().view(np.uint16))
    return _numpy(values)


def _numpy(values: Tensor) -> Array:
    values = values.detach().cpu()
    return np.asarray((values.float() if values.dtype == torch.bfloat16 else values).numpy())
