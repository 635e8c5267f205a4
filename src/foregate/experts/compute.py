"""One expert's matmuls, on weights that lie in a slot. The only kernel path: every budget and predictor shares it.

Few tokens go through the compiled kernels where module, dtype and machine allow; many tokens, and everything unusual,
through torch. The choice depends on the module and on the number of tokens alone, never on residency.

Shapes: T tokens, D hidden, F expert hidden, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from foregate.checkpoint.expand import Scratch, expanded
from foregate.checkpoint.quantise import SCALE
from foregate.errors import UnsupportedModelError
from foregate.experts.slots import SlotPool
from foregate.native import kernels
from foregate.native.decoder_layer import DecoderLayer
from foregate.types import ExpertLayout

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8}


class Ended(NamedTuple):
    """Nanoseconds. ``computed``: in which others had computed experts before. Of the end itself, ``beyond``: in other
    products; ``other``: in none."""

    computed: int
    beyond: int = 0
    other: int = 0


End = Callable[[], Ended]
"""Ends what was begun."""

KNOWN_PARAMS = {"gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"}
FUSED_PARAMS = {"gate_up_proj", "down_proj"}


class Weights:
    """The parameters of one expert: tensors by name, without copies, and the kernel over them once it is asked for."""

    def __init__(self, tensors: dict[str, Tensor], scratch: Scratch | None = None, slot: int = -1) -> None:
        self.tensors = tensors
        self.scratch = scratch
        self.slot = slot
        self._fused: dict[int, kernels.FusedExpert] = {}

    def fused(self, hidden: int) -> kernels.FusedExpert:
        """The compiled expert over these tensors, of ``hidden`` numbers between its matrices."""
        found = self._fused.get(hidden)
        if found is None:
            t = self.tensors
            scales = t.get("gate_up_proj" + SCALE), t.get("down_proj" + SCALE)
            found = kernels.FusedExpert(t["gate_up_proj"], scales[0], t["down_proj"], scales[1], hidden)
            self._fused[hidden] = found  # kept: others know where it lies
        return found


class SlotViews:
    """Typed tensors over slots, without copies. Views are kept: a slot's memory never moves."""

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool
        self._views: dict[int, list[Weights | None]] = {}
        """By slot, of a layout that is known by its place in memory; equal ones share them."""
        self._layouts: list[ExpertLayout] = []
        self._scratch = Scratch()

    def weights(self, slot: int, layout: ExpertLayout) -> Weights:
        """The parameters of ``layout``, over the bytes of ``slot``."""
        views = self._views.get(id(layout)) or self._views_of(layout)
        found = views[slot]
        if found is None:
            found = views[slot] = Weights(self._build(slot, layout), self._scratch, slot)
        return found

    def clear(self) -> None:
        """Drop every view, and with them the hold on the pool's memory."""
        self._views.clear()
        self._layouts.clear()

    def _views_of(self, layout: ExpertLayout) -> list[Weights | None]:
        equal = next((known for known in self._layouts if known == layout), None)
        views: list[Weights | None] = [None] * self._pool.slots if equal is None else self._views[id(equal)]
        self._views[id(layout)] = views
        self._layouts.append(layout)  # alive, so that no other takes its place
        return views

    def _build(self, slot: int, layout: ExpertLayout) -> dict[str, Tensor]:
        raw = torch.frombuffer(self._pool.view(slot), dtype=torch.uint8)
        return {p.name: raw[p.offset : p.offset + p.nbytes].view(DTYPES[p.dtype]).view(p.shape) for p in layout.params}


def check_supported(module: nn.Module, layout: ExpertLayout, family: str) -> None:
    """Raises UnsupportedModelError, naming the family, for parameters that ``expert_forward`` does not know."""
    unknown = {p.name.removesuffix(SCALE) for p in layout.params} - KNOWN_PARAMS
    if unknown:
        raise UnsupportedModelError(
            f"{family}: {type(module).__name__} has parameters that Foregate cannot run: {', '.join(sorted(unknown))}"
        )


def expert_forward(module: Any, x: Tensor, weights: Weights) -> Tensor:
    """Output [T, D] of one expert for ``x`` [T, D], with the flags and the activation of its transformers module."""
    if len(x) <= kernels.MOST_TOKENS and runs_fused(module, x, weights):
        return weights.fused(_fused_width(module, weights))(x)
    return torch_forward(module, x, weights.tensors, weights.scratch)


def experts_forward(module: Any, x: Tensor, weights: Sequence[Weights], into: Tensor, rows: Sequence[int]) -> None:
    """Write the outputs of several experts for the one token ``x`` [1, D] to ``rows`` of ``into`` [k, D], contiguous
    and of the dtype of ``x``: bit for bit those of ``expert_forward``."""
    if runs_fused(module, x, weights[0]) and len(weights) <= kernels.MOST_EXPERTS:
        width = _fused_width(module, weights[0])
        experts = [one.fused(width) for one in weights]
        if all(one.form == experts[0].form for one in experts):
            kernels.FusedExpert.together(experts, x, into, rows)
            return
    for row, one in zip(rows, weights, strict=True):
        into[row] = expert_forward(module, x, one)[0]


def experts_of(kernel: DecoderLayer, module: Any, weights: Sequence[Weights], rows: Sequence[int]) -> None:
    """``experts_forward`` for the token that ``kernel`` has routed, into its choice."""
    width = _fused_width(module, weights[0])
    if not width or not kernel.experts(_places(kernel, weights, width), rows, width):
        experts_forward(module, kernel.routed, weights, kernel.choice.parts, rows)


def begun_experts_of(
    kernel: DecoderLayer, module: Any, weights: Sequence[Weights], rows: Sequence[int], *, begun: int = 0
) -> End:
    """``experts_of``, begun by other threads where there are any; what this returns ends it, and must be called.

    ``begun``: bit i says that ``kernel`` has had row i begun already.
    """
    if begun:
        return partial(_end_begun, kernel, module, weights, rows, begun)
    width = _fused_width(module, weights[0])
    if width and kernel.begin_experts(_places(kernel, weights, width), rows, width):
        return partial(_end_begun, kernel, module, weights, rows, -1)
    return at_the_end(partial(experts_of, kernel, module), weights, rows)


def at_the_end(
    product: Callable[[Sequence[Weights], Sequence[int]], None], weights: Sequence[Weights], rows: Sequence[int]
) -> End:
    """As ``begun_experts_of``, of a ``product`` that nobody begins before its end."""

    def end() -> Ended:
        product(weights, rows)
        return Ended(0)

    return end


def _end_begun(kernel: DecoderLayer, module: Any, weights: Sequence[Weights], rows: Sequence[int], begun: int) -> Ended:
    residents = kernel.residents if begun > 0 else None
    computed = kernel.end_experts(0 if residents is None else residents.number)
    left = [i for i, row in enumerate(rows) if computed < 0 or not begun >> row & 1]
    if left:
        experts_of(kernel, module, [weights[i] for i in left], [rows[i] for i in left])
    return Ended(max(0, computed))


def _places(kernel: DecoderLayer, weights: Sequence[Weights], width: int) -> list[int]:
    """Where the experts are told of, which ``kernel`` will know from now on."""
    places, residents = [one.fused(width).at for one in weights], kernel.residents
    if residents is not None and residents.hidden == width:
        for one, at in zip(weights, places, strict=True):
            if one.slot >= 0:
                residents.tell(one.slot, at)
    return places


def runs_fused(module: Any, x: Tensor, weights: Weights) -> bool:
    """Whether the compiled expert computes what this module does, for weights and inputs of these dtypes."""
    return x.dtype in kernels.ACTIVATIONS and _fused_width(module, weights) > 0


def _fused_width(module: Any, weights: Weights) -> int:
    """F where the compiled expert computes what this module does, for weights of these dtypes; else 0."""
    known: int | None = module.__dict__.get("_foregate_fused")
    if known is None:
        fits = _is_plain(module) and _fits(weights.tensors)
        known = module.__dict__["_foregate_fused"] = module.down_proj.shape[-1] if fits else 0
    return known


def _is_plain(module: Any) -> bool:
    """Gate and up halves one after the other, SiLU, no bias, no norm: what most families are."""
    return (
        getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", False)
        and not module.is_transposed
        and not module.has_bias
        and not getattr(module, "has_post_expert_norm", False)
        and type(module)._apply_gate is _default_apply_gate
        and type(module.act_fn) in (nn.SiLU, SiLUActivation)
    )


def _fits(tensors: dict[str, Tensor]) -> bool:
    names = {name.removesuffix(SCALE) for name in tensors}
    if kernels.library() is None or names != FUSED_PARAMS:
        return False
    kinds = {tensors[name].dtype for name in names}
    if not kinds <= {torch.bfloat16, torch.int8, torch.uint8}:
        return False
    return all(kernels.matrix(tensors[n], tensors.get(n + SCALE)).columns <= kernels.MOST_COLUMNS for n in names)


def torch_forward(module: Any, x: Tensor, tensors: dict[str, Tensor], scratch: Scratch | None = None) -> Tensor:
    """The reference, and the path of many tokens and of everything unusual."""
    gated = getattr(module, "has_gate", True)
    transposed = getattr(module, "is_transposed", False)
    first = "gate_up_proj" if gated else "up_proj"
    weights = {name: _plain(module, name, tensors, scratch) for name in tensors if not name.endswith(SCALE)}
    hidden = _linear(x.to(weights[first].dtype), weights[first], weights.get(f"{first}_bias"), transposed)
    hidden = module._apply_gate(hidden) if gated else module.act_fn(hidden)
    out = _linear(hidden, weights["down_proj"], weights.get("down_proj_bias"), transposed)
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    return out


def _plain(module: Any, name: str, tensors: dict[str, Tensor], scratch: Scratch | None) -> Tensor:
    """The parameter in the model's own dtype and shape; a quantised one is taken apart, for this call only."""
    scales = tensors.get(name + SCALE)
    if scales is None:
        return tensors[name]
    meta = getattr(module, name)
    transposed = getattr(module, "is_transposed", False)
    return expanded(name, tensors[name], scales, tuple(meta.shape[1:]), meta.dtype, transposed, scratch)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    return x @ weight if bias is None else torch.addmm(bias, x, weight)
