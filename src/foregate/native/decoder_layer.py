"""A decoder layer of one token up to its experts in one compiled call (``native/layer.h``).

Shapes: D hidden, E experts, k chosen.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_void_p

import torch
from torch import Tensor

from foregate.native.attention_block import AttentionBlock, HeadNorm
from foregate.native.kernels import UNDECIDED, check, loaded, num_threads
from foregate.native.library import function
from foregate.native.matrix import Matrix
from foregate.native.router import Router, Routing

Norm = tuple[Tensor, float]


class _Layer(ctypes.Structure):
    """``decoder_layer`` of layer.h."""

    _fields_ = [
        ("attention", c_void_p),
        ("before", HeadNorm),
        ("after", HeadNorm),
        ("gate", Matrix),
        *((name, c_int32) for name in ("top", "normalised", "dtype")),
        *((name, c_void_p) for name in ("normed", "residual", "routed", "logits", "ids", "weights")),
    ]


class DecoderLayer:
    """``attention`` between two norms (weight [D], epsilon), with a sum around it, and the ``router`` after the second.

    ``normed`` (input of attention), ``residual`` (sum after it) and ``routed`` (input of the router) are [1, D],
    ``routing`` is what ``Router`` gives: all are overwritten by the next call.
    """

    def __init__(self, attention: AttentionBlock, before: Norm, after: Norm, router: Router) -> None:
        self._kept = after, router
        self.attention, self._before = attention, before
        width, gate, bf16 = attention.inputs, router.gate, torch.bfloat16
        self.normed, self.residual, self.routed = (torch.zeros(1, width, dtype=bf16) for _ in range(3))
        logits, weights = torch.zeros(1, gate.rows, dtype=bf16), torch.zeros(1, router.top_k, dtype=router.dtype)
        self.routing: Routing = logits, weights, torch.zeros(1, router.top_k, dtype=torch.int64)
        norms = [HeadNorm(weight.data_ptr(), len(weight), small) for weight, small in (before, after)]
        rows = (self.normed, self.residual, self.routed, logits, self.routing[2], weights)
        self._layer = _Layer(
            attention.at, *norms, gate, router.top_k, router.normalised, router.kind, *(row.data_ptr() for row in rows)
        )
        self._at = ctypes.addressof(self._layer)
        self._run = function(loaded(), "foregate_layer", 14)
        self._norm = loaded().foregate_rms_norm

    def norm(self, x: Tensor) -> None:
        """Fill ``normed`` for ``x`` [1, 1, D] (bf16, contiguous) alone."""
        weight, small = self._before
        check(self._norm(x.data_ptr(), weight.data_ptr(), self.normed.data_ptr(), 1, len(weight), small))

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, place: tuple[int, ...], normed: bool, route: bool) -> bool:
        """Fill ``residual``, ``routed`` and, with ``route``, ``routing``: whether the last of them counts now.

        ``x`` and the rest as ``AttentionBlock.attention`` takes them; ``normed``: ``norm`` has been called for ``x``.
        """
        code = self._run(
            self._at, x.data_ptr(), normed + 2 * (not route), cos.data_ptr(), sin.data_ptr(), cos.shape[2], *place,
            num_threads(),
        )  # fmt: skip
        if code == UNDECIDED:
            return False
        check(code)
        return route
