"""What a token costs without any expert: attention, norms, routers, output head."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import torch

from foregate.engine.engine import Engine

STEPS = 12


@torch.inference_mode()
def dense_seconds(engine: Engine) -> float:
    """Median seconds of a decode step of ``engine``'s model whose expert modules return zeros."""
    modules = [engine.model.get_submodule(path) for path in engine.spec.module_paths]
    for module in modules:
        module.forward = _nothing
    try:
        out = engine.model(input_ids=torch.tensor([[1, 2, 3, 4]]), use_cache=True)
        seconds = []
        for _ in range(STEPS):
            began = perf_counter()
            with engine.dense.decode():
                out = engine.model(input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values, use_cache=True)
            seconds.append(perf_counter() - began)
    finally:
        for module in modules:
            del module.forward
    return median(seconds)


def _nothing(hidden_states: Any, *_: Any, **__: Any) -> Any:
    return torch.zeros_like(hidden_states)
