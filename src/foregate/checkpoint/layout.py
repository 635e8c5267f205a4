"""How the parameters of one expert lie in a slot."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from foregate.checkpoint.dtypes import BITS
from foregate.types import ExpertLayout, ParamLayout, align_up

PARAM_ALIGNMENT = 64
"""Bytes. A cache line, and the widest vector register."""


def lay_out(params: Iterable[tuple[str, str, tuple[int, ...]]]) -> ExpertLayout:
    """Place ``params`` (name, dtype, shape) one after the other."""
    placed: list[ParamLayout] = []
    end = 0
    for name, dtype, shape in params:
        offset = align_up(end, PARAM_ALIGNMENT)
        nbytes = prod(shape) * BITS[dtype] // 8
        placed.append(ParamLayout(name, dtype, shape, offset, nbytes))
        end = offset + nbytes
    return ExpertLayout(tuple(placed), align_up(end))


def gaps(layout: ExpertLayout) -> list[tuple[int, int]]:
    """The padding of a slot, as (begin, end) in bytes: always zero, so that equal experts are equal bytes."""
    found: list[tuple[int, int]] = []
    end = 0
    for param in layout.params:
        if param.offset > end:
            found.append((end, param.offset))
        end = param.offset + param.nbytes
    return [*found, (end, layout.nbytes)] if end < layout.nbytes else found
