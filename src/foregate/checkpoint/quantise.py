"""The quantised forms of a weight matrix, and of a slot: how they lie in memory, how they are made and taken apart.

Shapes: N rows (outputs), K columns (inputs), g columns a group.

int8: I8 [N, K], one F32 scale a row [N]: w = q s.
int4: U8 [N'/16, K'/8, 64], one BF16 scale a group [N'/16, K'/g, 16]: w = (q - 8) s. A block of 64 bytes holds 16 rows
and 8 columns: byte 4 r + j has column j in its low and column 4 + j in its high half. N' and K' are N and K rounded
up to 16 and g, with values of zero; of a fused gate and up each half is rounded up by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foregate.checkpoint.dtypes import FLOATS
from foregate.checkpoint.layout import gaps, lay_out
from foregate.errors import ConfigError
from foregate.types import ExpertLayout, ParamLayout, align_up

SCALE = ".scale"
"""What the name of a parameter's scales adds to its own."""

GROUPS = (32, 64, 128)
"""Columns that may share a scale in int4."""

ROWS, COLUMNS = 16, 8
"""Of one 64-byte block of int4."""

_FUSED = "gate_up_proj"
_TRIALS = (-8.0, 7.0, 7.6, -8.8)
"""Values that the largest weight of a group may become. Beyond -8 … 7 the largest is clipped and the others are finer;
the trial with the least squared error wins."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """``bits`` 8 or 4 (0: as the model stores them); ``group`` columns a scale, 0 for whole rows."""

    bits: int = 0
    group: int = 0

    @property
    def name(self) -> str:
        """As ``parse_scheme`` reads it."""
        return f"int{self.bits}" + (f"/{self.group}" if self.group else "") if self.bits else "source"


PLAIN = Scheme()


def parse_scheme(text: str, group: int | None = None) -> Scheme:
    """``source``, ``int8``, ``int4``, ``int4/64``; ``group`` is --group-size, where given. Raises ConfigError."""
    name, _, size = text.partition("/")
    if size and group is not None:
        raise ConfigError(f"group size {group}: {text!r} has one already")
    if name not in ("source", "int8", "int4") or (size and not size.isdecimal()):
        raise ConfigError(f"dtype {text!r}: choose source, int8 or int4 (int4/64 for groups of 64)")
    columns = int(size) if size else group
    if name != "int4":
        if columns is not None:
            raise ConfigError(f"group size {columns}: only int4 has groups; {name} takes none")
        return Scheme(8) if name == "int8" else PLAIN
    columns = GROUPS[0] if columns is None else columns
    if columns not in GROUPS:
        raise ConfigError(f"group size {columns}: choose {', '.join(map(str, GROUPS))}")
    return Scheme(4, columns)


# Layouts


def stored(
    name: str, dtype: str, shape: tuple[int, ...], scheme: Scheme, transposed: bool = False
) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    """What a parameter becomes: (name, dtype, shape) of its values and of its scales; itself where it is no matrix."""
    if not scheme.bits or len(shape) != 2:
        return [(name, dtype, shape)]
    rows, columns = shape[::-1] if transposed else shape
    if scheme.bits == 8:
        return [(name, "I8", (rows, columns)), (name + SCALE, "F32", (rows,))]
    blocks, wide = _padded_rows(name, rows) // ROWS, align_up(columns, scheme.group)
    return [
        (name, "U8", (blocks, wide // COLUMNS, 64)),
        (name + SCALE, "BF16", (blocks, wide // scheme.group, ROWS)),
    ]


def quantised_layout(layout: ExpertLayout, scheme: Scheme, transposed: bool) -> ExpertLayout:
    """The slot of an expert whose unquantised slot is ``layout``. Biases stay as they are."""
    if not scheme.bits:
        return layout
    return lay_out(item for p in layout.params for item in stored(p.name, p.dtype, p.shape, scheme, transposed))


def _halves(name: str, rows: int) -> int:
    return 2 if name.endswith(_FUSED) and rows % 2 == 0 else 1


def _padded_rows(name: str, rows: int) -> int:
    halves = _halves(name, rows)
    return halves * align_up(rows // halves, ROWS)


# Values


def quantise_slot(
    slot: memoryview, layout: ExpertLayout, into: memoryview, target: ExpertLayout, scheme: Scheme, transposed: bool
) -> None:
    """Fill ``into`` (``target``, padding zeroed) from an unquantised ``slot`` (``layout``)."""
    out = np.frombuffer(into, np.uint8, target.nbytes)
    places = {param.name: param for param in target.params}
    for param in layout.params:
        raw = torch.frombuffer(slot[param.offset : param.offset + param.nbytes], dtype=FLOATS[param.dtype])
        for name, tensor in quantised(param.name, raw.view(param.shape), scheme, transposed):
            place = places[name]
            out[place.offset : place.offset + place.nbytes] = tensor.contiguous().view(torch.uint8).numpy().ravel()
    for begin, end in gaps(target):
        out[begin:end] = 0


def quantised(name: str, weight: Tensor, scheme: Scheme, transposed: bool = False) -> list[tuple[str, Tensor]]:
    """The tensors that ``stored`` describes, from the values of the parameter."""
    if not scheme.bits or weight.ndim != 2:
        return [(name, weight)]
    matrix = (weight.T if transposed else weight).float()
    values, scales = _int8(matrix) if scheme.bits == 8 else _int4(name, matrix, scheme.group)
    return [(name, values), (name + SCALE, scales)]


def dequantised(name: str, values: Tensor, scales: Tensor, shape: tuple[int, ...], transposed: bool = False) -> Tensor:
    """The matrix in float32 and in its own ``shape``."""
    rows, columns = shape[::-1] if transposed else shape
    matrix = values.float() * scales[:, None] if values.dtype is torch.int8 else _from_int4(values, scales)
    if values.dtype is torch.uint8:
        halves = _halves(name, rows)
        matrix = matrix.view(halves, -1, matrix.shape[-1])[:, : rows // halves, :columns].reshape(rows, columns)
    return matrix.T if transposed else matrix


def _int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    largest = matrix.abs().amax(dim=1)
    scales = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (matrix / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def _int4(name: str, matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    rows, columns = matrix.shape
    halves = _halves(name, rows)
    padded = matrix.new_zeros(halves, align_up(rows // halves, ROWS), align_up(columns, group))
    padded[:, : rows // halves, :columns] = matrix.view(halves, -1, columns)
    groups = padded.view(-1, padded.shape[-1] // group, group)
    scales = _int4_scales(groups)
    values = ((groups / scales[..., None]).round_().clamp_(-8, 7) + 8).to(torch.uint8)
    return _to_blocks(values.view(groups.shape[0], -1)), _block_scales(scales)


def _int4_scales(groups: Tensor) -> Tensor:
    """The best of ``_TRIALS`` for each group [N, G], as bf16 holds it, so that rounding meets the true scale."""
    extreme = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    extreme = torch.where(extreme == 0, torch.ones_like(extreme), extreme)
    best, error = torch.ones_like(extreme), torch.full_like(extreme, torch.inf)
    for trial in _TRIALS:
        scale = (extreme / trial).bfloat16().float()
        loss = ((groups / scale[..., None]).round_().clamp_(-8, 7) * scale[..., None] - groups).square_().sum(dim=-1)
        best, error = torch.where(loss < error, scale, best), torch.minimum(loss, error)
    return best


def _to_blocks(values: Tensor) -> Tensor:
    """[N', K'] of 0 … 15 to [N'/16, K'/8, 64]."""
    rows, columns = values.shape
    blocks = values.view(rows // ROWS, ROWS, columns // COLUMNS, 2, 4).permute(3, 0, 2, 1, 4)
    return (blocks[0] | blocks[1] << 4).reshape(rows // ROWS, columns // COLUMNS, 64)


def _block_scales(scales: Tensor) -> Tensor:
    """[N', G] to [N'/16, G, 16]."""
    rows, groups = scales.shape
    return scales.view(rows // ROWS, ROWS, groups).transpose(1, 2).contiguous().bfloat16()


def _from_int4(values: Tensor, scales: Tensor) -> Tensor:
    """[N', K'] in float32."""
    blocks, steps, _ = values.shape
    halves = torch.stack((values & 15, values >> 4)).view(2, blocks, steps, ROWS, 4)
    whole = halves.permute(1, 3, 2, 0, 4).reshape(blocks * ROWS, steps * COLUMNS).float() - 8
    own = scales.float().transpose(1, 2).reshape(blocks * ROWS, -1, 1)
    return (whole.view(blocks * ROWS, own.shape[1], -1) * own).view(blocks * ROWS, -1)


def scheme_of(param: ParamLayout, scales: ParamLayout) -> Scheme:
    """The scheme of a quantised parameter, from its layout and that of its scales."""
    if param.dtype == "I8":
        return Scheme(8)
    return Scheme(4, param.shape[1] * COLUMNS // scales.shape[1])
