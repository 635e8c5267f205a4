"""One expert's matmuls, on weights that lie in a slot. The only kernel path: every budget and predictor shares it.

Shapes: T tokens, D hidden, F expert hidden, S slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foregate.errors import UnsupportedModelError
from foregate.experts.slots import SlotPool
from foregate.types import ExpertLayout

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KNOWN_PARAMS = {"gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"}


class SlotViews:
    """Typed tensors over slots, without copies. Views are kept: a slot's memory never moves."""

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool
        self._views: dict[tuple[int, int], dict[str, Tensor]] = {}

    def weights(self, slot: int, layout: ExpertLayout) -> dict[str, Tensor]:
        """Parameter name → tensor of its layout's shape, over the bytes of ``slot``."""
        key = (slot, id(layout))
        found = self._views.get(key)
        if found is None:
            found = self._views[key] = self._build(slot, layout)
        return found

    def clear(self) -> None:
        """Drop every view, and with them the hold on the pool's memory."""
        self._views.clear()

    def _build(self, slot: int, layout: ExpertLayout) -> dict[str, Tensor]:
        raw = torch.frombuffer(self._pool.view(slot), dtype=torch.uint8)
        return {p.name: raw[p.offset : p.offset + p.nbytes].view(DTYPES[p.dtype]).view(p.shape) for p in layout.params}


def check_supported(module: nn.Module, layout: ExpertLayout, family: str) -> None:
    """Raises UnsupportedModelError, naming the family, for parameters that ``expert_forward`` does not know."""
    unknown = {p.name for p in layout.params} - KNOWN_PARAMS
    if unknown:
        raise UnsupportedModelError(
            f"{family}: {type(module).__name__} has parameters that Foregate cannot run: {', '.join(sorted(unknown))}"
        )


def expert_forward(module: Any, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Output [T, D] of one expert for ``x`` [T, D], with the flags and the activation of its transformers module."""
    gated = getattr(module, "has_gate", True)
    transposed = getattr(module, "is_transposed", False)
    first = "gate_up_proj" if gated else "up_proj"
    hidden = _linear(x.to(weights[first].dtype), weights[first], weights.get(f"{first}_bias"), transposed)
    hidden = module._apply_gate(hidden) if gated else module.act_fn(hidden)
    out = _linear(hidden, weights["down_proj"], weights.get("down_proj_bias"), transposed)
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    return x @ weight if bias is None else torch.addmm(bias, x, weight)
