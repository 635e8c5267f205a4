"""One expert of an original as the bytes of its slot in a pack: for writing it and for comparing with it."""

from __future__ import annotations

from collections.abc import Sequence

from foregate.checkpoint.assemble import assemble
from foregate.checkpoint.naming import LayerSources
from foregate.checkpoint.precision import Precision
from foregate.checkpoint.quantise import quantise_slot, quantised_layout
from foregate.checkpoint.skeleton import ExpertsModule
from foregate.types import ExpertKey, Segment


def make_slot(
    layer: LayerSources,
    segments: Sequence[Segment],
    parts: Sequence[memoryview],
    module: ExpertsModule,
    precision: Precision,
    key: ExpertKey,
) -> bytearray:
    """The slot of ``key``, padding zeroed; ``parts`` are the bytes of its ``segments``."""
    plain = bytearray(layer.layout.nbytes)
    assemble(layer, segments, parts, memoryview(plain))
    scheme = precision.scheme(key)
    if not scheme.bits:
        return plain
    target = quantised_layout(layer.layout, scheme, module.transposed)
    slot = bytearray(target.nbytes)
    quantise_slot(memoryview(plain), layer.layout, memoryview(slot), target, scheme, module.transposed)
    return slot
