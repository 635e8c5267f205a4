"""From the bytes of an expert's tensors to the bytes of its slot: for packing and for reading the originals alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from foregate.checkpoint.dtypes import FLOATS
from foregate.checkpoint.layout import gaps
from foregate.checkpoint.naming import LayerSources
from foregate.checkpoint.recipe import Recipe
from foregate.types import Segment


def assemble(layer: LayerSources, segments: Sequence[Segment], parts: Sequence[memoryview], into: memoryview) -> None:
    """Fill ``into`` with one expert in slot layout, padding zeroed; ``parts`` are the bytes of ``segments``."""
    slot = np.frombuffer(into, np.uint8, layer.layout.nbytes)
    done = 0
    for recipe in layer.recipes:
        count = len(recipe.sources)
        _fill(recipe, segments[done : done + count], parts[done : done + count], slot)
        done += count
    for begin, end in gaps(layer.layout):
        slot[begin:end] = 0


def _fill(recipe: Recipe, segments: Sequence[Segment], parts: Sequence[memoryview], slot: np.ndarray) -> None:
    end = recipe.layout.offset
    if recipe.copies:
        for segment, part in zip(segments, parts, strict=True):
            # numpy copies without the interpreter lock; assigning memoryviews would hold it
            np.copyto(slot[end : end + segment.nbytes], np.frombuffer(part, np.uint8, segment.nbytes))
            end += segment.nbytes
        return
    tensors = [_tensor(segment, part) for segment, part in zip(segments, parts, strict=True)]
    out = torch.frombuffer(slot[end : end + recipe.layout.nbytes].data, dtype=FLOATS[recipe.layout.dtype])
    out.view(recipe.layout.shape).copy_(recipe.make(tensors))


def _tensor(segment: Segment, part: memoryview) -> torch.Tensor:
    return torch.frombuffer(part[: segment.nbytes], dtype=FLOATS[segment.dtype]).view(segment.shape)
