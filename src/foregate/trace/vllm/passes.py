"""From the tensors of one pass to numpy arrays of all its layers.

Shapes: R rows of a pass, L MoE layers, k width of the expert lists, E width of the score lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foregate.errors import TraceError
from foregate.trace import format as fmt
from foregate.trace.record import Array
from foregate.trace.vllm.tap import LayerPass


@dataclass(frozen=True, slots=True)
class RoutedPass:
    """``experts`` and ``weights`` [R, L, k], padded; ``scores`` [R, L, E] or None; ``timings`` [L]."""

    experts: Array
    weights: Array
    scores: Array | None
    timings: dict[str, NDArray[np.int64]]


def gather(layers: Sequence[LayerPass], rows: int, pad: int, timings: Sequence[str]) -> RoutedPass:
    """The first ``rows`` rows (vLLM pads behind them) of every layer. ``pad`` is the id of no expert.

    Raises TraceError where a layer routed fewer.
    """
    experts = [_numpy(layer.experts, rows) for layer in layers]
    scores = [_numpy(layer.scores, rows) for layer in layers if layer.scores is not None]
    return RoutedPass(
        experts=_stack(experts, pad),
        weights=_stack([_numpy(layer.weights, rows) for layer in layers], np.nan),
        scores=_stack(scores, np.nan) if scores else None,
        timings={
            name: np.array([layer.timings.get(name, fmt.NOT_MEASURED) for layer in layers], np.int64)
            for name in timings
        },
    )


def _numpy(values: Tensor | None, rows: int) -> Array:
    """[R, …] on the host; integers as int64, since ids are compared with padding, the rest as float32."""
    assert values is not None
    if len(values) < rows:
        raise TraceError(f"vLLM: a layer routed {len(values)} of {rows} tokens; is the MoE cut by token?")
    values = values[:rows].cpu()
    return np.asarray((values.float() if values.is_floating_point() else values.long()).numpy())


def _stack(layers: Sequence[Array], pad: float) -> Array:
    """L arrays [R, width of the layer] → [R, L, largest width]."""
    width = max(layer.shape[1] for layer in layers)
    found = np.full((len(layers[0]), len(layers), width), pad, layers[0].dtype)
    for number, layer in enumerate(layers):
        found[:, number, : layer.shape[1]] = layer
    return found
