"""Every byte position of a pack, known before the first weight is read: that is what makes packing resumable.

Both files are valid safetensors files. The experts file has data from a multiple of 4096 bytes on, every expert in
one piece in slot layout, and U8 padding tensors in the gaps, because the format forbids holes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from foregate.checkpoint.dtypes import BITS
from foregate.checkpoint.layout import gaps
from foregate.checkpoint.packdense import DenseTensor
from foregate.checkpoint.packorder import Orders
from foregate.types import ALIGNMENT, ExpertKey, ExpertLayout, align_up


@dataclass(frozen=True, slots=True)
class PlannedExpert:
    """Where one expert goes: ``nbytes`` at byte ``offset`` of the experts file."""

    key: ExpertKey
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ExpertsPlan:
    """The experts file: ``header`` (with its length prefix), then ``experts`` without a gap, to ``nbytes``."""

    header: bytes
    experts: tuple[PlannedExpert, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class DensePlan:
    """The dense file: ``header`` (with its length prefix), then the bytes of ``tensors``, to ``nbytes``."""

    header: bytes
    tensors: tuple[DenseTensor, ...]
    nbytes: int


def plan_experts(paths: Sequence[str], orders: Orders, layout_of: Callable[[ExpertKey], ExpertLayout]) -> ExpertsPlan:
    """Place the experts of every MoE layer (module ``paths``), by layer, then as ``orders`` says."""
    entries: dict[str, dict[str, object]] = {}
    placed: list[tuple[ExpertKey, int, int]] = []
    end = 0
    for layer, (path, order) in enumerate(zip(paths, orders, strict=True)):
        for expert in order:
            layout = layout_of(ExpertKey(layer, expert))
            entries.update(_entries(f"{path}.{expert}", layout, end))
            placed.append((ExpertKey(layer, expert), end, layout.nbytes))
            end += layout.nbytes
    header = _header(entries, ALIGNMENT)
    experts = tuple(PlannedExpert(key, len(header) + offset, nbytes) for key, offset, nbytes in placed)
    return ExpertsPlan(header, experts, len(header) + end)


def plan_dense(tensors: Iterable[DenseTensor]) -> DensePlan:
    """Place the dense ``tensors``: widest dtype first, so that all are aligned to their elements, then by name."""
    ordered = tuple(sorted(tensors, key=lambda tensor: (-BITS[tensor.dtype], tensor.name)))
    entries: dict[str, dict[str, object]] = {}
    end = 0
    for tensor in ordered:
        entries[tensor.name] = _entry(tensor.dtype, tensor.shape, end, end + tensor.nbytes)
        end += tensor.nbytes
    header = _header(entries, 8)
    return DensePlan(header, ordered, len(header) + end)


def _entries(name: str, layout: ExpertLayout, base: int) -> dict[str, dict[str, object]]:
    """Header entries of one expert at ``base``, in the order of their offsets."""
    spans = [
        (p.offset, f"{name}.{p.name}", _entry(p.dtype, p.shape, base + p.offset, base + p.offset + p.nbytes))
        for p in layout.params
    ]
    for number, (begin, end) in enumerate(gaps(layout)):
        spans.append((begin, f"{name}.padding.{number}", _entry("U8", (end - begin,), base + begin, base + end)))
    return {key: entry for _, key, entry in sorted(spans, key=lambda span: span[0])}


def _entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _header(entries: dict[str, dict[str, object]], alignment: int) -> bytes:
    """Length and JSON, filled up with spaces as the format allows: data starts at a multiple of ``alignment``."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    length = align_up(8 + len(text), alignment) - 8
    return length.to_bytes(8, "little") + text.ljust(length)
