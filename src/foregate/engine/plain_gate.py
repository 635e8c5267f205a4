"""Routers that are one matrix, asked without their module: a fifth of the calls, the same order of experts.

Shapes: T tokens, E experts, k chosen, D hidden.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from foregate.native import kernels

ENOUGH = 8
"""Tokens whose choice the matrix alone must have explained before it is believed; one that it does not, ends it."""


class PlainGate:
    """The matrix of ``router``, if it has nothing else. ``trusted`` says whether it may speak for the router."""

    def __init__(self, router: nn.Module | None, experts: int) -> None:
        self._weight, self._bias = _matrix(router, experts)
        self._matrix = _native(self._weight, self._bias)
        self._agreed = 0
        self.trusted = False

    @property
    def open(self) -> bool:
        """Whether more tokens are wanted."""
        return self._weight is not None and not self.trusted

    def see(self, router_input: Tensor, chosen: NDArray[np.int64]) -> None:
        """The router chose ``chosen`` [T, k] for ``router_input`` [T, D]."""
        if self._weight is None or router_input.dtype != self._weight.dtype:
            self._weight = None
            return
        products = torch.cat([self._product(row[None]) for row in router_input])
        if not _explains(products, torch.from_numpy(chosen)):
            self._weight, self.trusted = None, False
            return
        self._agreed += len(chosen)
        self.trusted = self._agreed >= ENOUGH

    def logits(self, x: Tensor) -> Tensor:
        """Scores [E] of ``x`` [1, D]; only when ``trusted``."""
        return self._product(x)[0]

    def ranker(self, norm: tuple[Tensor, float] | None, top_k: int) -> kernels.Ranker | None:
        """``order`` of ``logits`` in one call, of what ``norm`` makes of its input; None where the kernels cannot."""
        if self._matrix is None or self._weight is None or not 1 <= top_k <= len(self._weight) <= kernels.MOST_RANKED:
            return None
        return kernels.Ranker(self._weight, norm, top_k)

    def _product(self, x: Tensor) -> Tensor:
        """[1, E] for ``x`` [1, D]; by the compiled kernel where it can, which takes a tenth of torch's time."""
        assert self._weight is not None
        if self._matrix is None or not x.is_contiguous():
            return F.linear(x, self._weight, self._bias)
        return kernels.linear(self._matrix, x, len(self._weight))


def _explains(products: Tensor, chosen: Tensor) -> bool:
    """Whether ``chosen`` [T, k] are the best of ``products`` [T, E], but for what rounding does to either: many rows at
    once are not summed up as one is, which decides about every thousandth close choice."""
    if chosen.min() < 0 or chosen.max() >= products.shape[1]:
        return False
    taken = torch.zeros(products.shape, dtype=torch.bool).scatter_(1, chosen, True)
    last = products.topk(chosen.shape[1]).values[:, -1:].float()
    room = 2 * torch.finfo(products.dtype).eps * last.abs()
    better, worse = products.float() > last + room, products.float() < last - room
    distinct = (taken.sum(dim=1) == chosen.shape[1]).all()
    return bool(distinct) and not bool((better & ~taken | worse & taken).any())


def _native(weight: Tensor | None, bias: Tensor | None) -> kernels.Matrix | None:
    if weight is None or bias is not None or weight.dtype is not torch.bfloat16 or not weight.is_contiguous():
        return None
    fits = weight.device.type == "cpu" and weight.shape[1] <= kernels.MOST_COLUMNS and kernels.library() is not None
    return kernels.matrix(weight, None) if fits else None


def order(logits: Tensor, top_k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Experts by ``logits`` [E], best first, with their scores. Ties at the k-th place fall as in ``topk``."""
    scores: NDArray[np.float32] = logits.float().numpy()
    ranked = np.argsort(-scores, kind="stable")
    if top_k < len(ranked) and scores[ranked[top_k - 1]] == scores[ranked[top_k]]:
        first = logits.topk(top_k).indices.numpy()
        ranked = np.concatenate([first, ranked[~np.isin(ranked, first)]])
    return ranked, scores[ranked]


def _matrix(router: nn.Module | None, experts: int) -> tuple[Tensor | None, Tensor | None]:
    if router is None or any(True for _ in router.buffers()):
        return None, None
    named = {name: value.detach() for name, value in router.named_parameters()}
    weight, bias = named.pop("weight", None), named.pop("bias", None)
    if named or weight is None or weight.dim() != 2 or len(weight) != experts or weight.is_meta:
        return None, None
    return (weight, bias) if torch.is_floating_point(weight) else (None, None)
