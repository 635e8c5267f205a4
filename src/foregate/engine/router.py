"""Routers of one token by the compiled kernel: which of a model's they are, and the forward that they get.

torch takes six calls for it, some 55 us a layer more than the kernel where the caches are cold. Which modules are taken
is decided when the model is built: by their parts, and then by trial.

Shapes: D hidden, E experts, k chosen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from foregate.native import kernels
from foregate.native.router import Router, Routing

TRIALS, ALIKE = 64, 0.9
"""A router is believed to be the kernel's if it chooses the same in this share of so many random tokens: a logit that
is rounded the other way may change a close choice."""

SAME = 0.99
"""Share of the weights of the same choice that must have the same bits, once rounded to bf16."""

COMPARED = 0.5
"""Share of the tokens whose logits must all be the same: of those the weights are compared to the bit."""

Forward = Callable[..., Any]


def forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    """Routers of ``model`` and the forward that each is to have."""
    if kernels.library() is None:
        return
    for module in model.modules():
        weight = _weight(module)
        found = None if weight is None else _kernel(module, weight)
        if found is not None:
            assert weight is not None
            yield module, _forward(module, found, weight.shape[1])


def _weight(module: nn.Module) -> Tensor | None:
    """The matrix of a module that is a router of nothing else, by its name and parts. A choice by groups is not: random
    tokens may not show it."""
    named = type(module).__name__.endswith(("Router", "Gate"))
    parts, top_k = [*module.parameters(), *module.buffers()], getattr(module, "top_k", None)
    weight = getattr(module, "weight", None)
    if any("group" in name and value not in (None, 1) for name, value in vars(module).items()):
        return None
    if not named or len(parts) != 1 or not isinstance(weight, Tensor) or not isinstance(top_k, int):
        return None
    fits = weight.dim() == 2 and 1 <= top_k <= len(weight) <= kernels.MOST_RANKED
    plain = weight.dtype is torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()
    called = list(inspect.signature(module.forward).parameters) == ["hidden_states"]
    return weight if fits and plain and called and weight.shape[1] <= kernels.MOST_COLUMNS else None


@torch.inference_mode()
def _kernel(module: Any, weight: Tensor) -> Router | None:
    """The kernel that gives what ``module`` does on random tokens, if one does."""
    x = torch.randn(TRIALS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    theirs = module.forward(x)
    if not isinstance(theirs, tuple) or len(theirs) != 3 or not all(isinstance(part, Tensor) for part in theirs):
        return None
    if theirs[1].dtype not in kernels.ACTIVATIONS:
        return None
    for normalised in (False, True):
        ours = Router(weight, module.top_k, normalised=normalised, dtype=theirs[1].dtype)
        if _agrees(theirs, [ours(row) for row in x]):
            return ours
    return None


def _agrees(theirs: Routing, ours: list[Routing | None]) -> bool:
    told = [(n, routing) for n, routing in enumerate(ours) if routing is not None]
    if not told:
        return False
    rows = [n for n, _ in told]
    known = tuple(part[rows] for part in theirs)
    found = tuple(torch.cat(parts) for parts in zip(*(routing for _, routing in told), strict=True))
    if any(a.dtype is not b.dtype or a.shape != b.shape for a, b in zip(known, found, strict=True)):
        return False
    # Of equal scores inside a choice each takes the first in its own way.
    places = [choice.argsort(dim=1) for choice in (known[2], found[2])]
    same = (known[2].gather(1, places[0]) == found[2].gather(1, places[1])).all(dim=1)
    if not torch.allclose(known[0], found[0], rtol=0.02, atol=0.02) or same.float().mean() < ALIKE:
        return False
    # A logit that is rounded the other way moves the weights of its token by some per cent.
    weights = [part[1].gather(1, at) for part, at in zip((known, found), places, strict=True)]
    compared = same & (known[0] == found[0]).all(dim=1)
    some, others = (w[same].float() for w in weights)
    if compared.float().mean() < COMPARED or not torch.allclose(some, others, rtol=0.05):
        return False
    one, other = (w[compared] for w in weights)
    alike = (one.bfloat16() == other.bfloat16()).float().mean() >= SAME
    return bool(alike) and torch.allclose(one.float(), other.float(), rtol=0.01)


def _forward(module: nn.Module, router: Router, inputs: int) -> Forward:
    """``module.forward`` by the kernel for one token; the choice depends on the input alone."""
    theirs = module.forward

    def one_token(hidden_states: Tensor) -> Any:
        x = hidden_states
        routed = router(x) if x.dtype is torch.bfloat16 and x.numel() == inputs and x.is_contiguous() else None
        return theirs(x) if routed is None else routed

    vars(one_token).update(native=router, theirs=theirs)
    return one_token


def native_router(module: nn.Module) -> Router | None:
    """The kernel of a router that is computed by one now; None for any other."""
    return getattr(module.forward, "native", None)


def undecided(module: nn.Module) -> Forward:
    """What such a router asks where its kernel cannot tell."""
    theirs: Forward = vars(module.forward)["theirs"]
    return theirs
