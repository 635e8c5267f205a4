"""The order of a pack from a routing trace: what the same tokens choose lies side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from foregate.analysis.pairs import PairCounts
from foregate.analysis.prompt import Shape
from foregate.checkpoint.packorder import Orders, by_coactivation
from foregate.trace.reader import TraceReader


def traced_orders(trace: Path) -> Orders:
    """File order of every layer's experts. Raises TraceError for a trace that cannot be read."""
    reader = TraceReader(trace)
    model = reader.header.model
    pairs = PairCounts(Shape(model.experts_per_layer, model.top_k), max_hop=0)
    for part in reader:
        pairs.add(part.grid(part.experts).astype(np.int32))
    pairs.flush()
    return tuple(by_coactivation(pairs.pair(n, n)[:count, :count]) for n, count in enumerate(model.experts_per_layer))
