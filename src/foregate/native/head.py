"""What comes after the last layer, for one token: norm and head in one compiled call, and the best of the logits
(``native/head.h``).

Shapes: D hidden, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_void_p

import torch
from torch import Tensor

from foregate.native.attention_block import HeadNorm
from foregate.native.decoder_layer import Norm
from foregate.native.kernels import called, check, library, num_threads
from foregate.native.matrix import Matrix


class _Head(ctypes.Structure):
    """``output_head`` of head.h."""

    _fields_ = [("norm", HeadNorm), ("head", Matrix), ("normed", c_void_p), ("logits", c_void_p)]


class Head:
    """``norm`` (weight [D], epsilon), then ``head`` [V, D], which lies in ``tensors``.

    ``logits`` [V] (bf16) is what a call fills: the next token overwrites it.
    """

    def __init__(self, norm: Norm, head: Matrix, tensors: Sequence[Tensor]) -> None:
        weight, small = norm
        self.logits = torch.zeros(head.rows, dtype=torch.bfloat16)
        normed = torch.zeros(len(weight), dtype=torch.bfloat16)
        self._kept = weight, normed, *tensors
        places = normed.data_ptr(), self.logits.data_ptr()
        self._head = _Head(HeadNorm(weight.data_ptr(), len(weight), small), head, *places)
        self._at = ctypes.addressof(self._head)
        self._run = called("foregate_head", 3)

    def __call__(self, x: Tensor) -> Tensor:
        """``logits`` for D numbers ``x`` (bf16, contiguous). Raises as ``check``."""
        check(self._run(self._at, x.data_ptr(), num_threads()))
        return self.logits


def best(logits: Tensor) -> int:
    """The first of the largest of ``logits`` [V], of NaNs if there are any: what ``argmax`` gives, which takes 4 ns
    for a number in bf16."""
    if library() is None or logits.dtype is not torch.bfloat16 or not logits.is_contiguous():
        return int(logits.float().numpy().argmax())
    return called("foregate_best", 2)(logits.data_ptr(), logits.numel())
