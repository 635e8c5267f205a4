"""The router of a MoE layer for one token in one compiled call (``native/route.h``).

Shapes: D hidden, E experts, k chosen.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from foregate.native.kernels import ACTIVATIONS, UNDECIDED, check, loaded, matrix

Routing = tuple[Tensor, Tensor, Tensor]


class Router:
    """Softmax over the products of ``gate`` (bf16 [E, D], contiguous), of which the ``top_k`` largest are chosen.

    ``normalised``: their weights are divided by their sum. ``dtype``: of the weights, bf16 or float32.
    """

    def __init__(self, gate: Tensor, top_k: int, *, normalised: bool, dtype: torch.dtype) -> None:
        self._kept, self.gate = gate, matrix(gate, None)
        self._at = ctypes.byref(self.gate)
        self.top_k, self.normalised = top_k, normalised
        self.dtype, self.kind = dtype, ACTIVATIONS[dtype]
        self._logits, self._chosen = (1, len(gate)), (1, top_k)
        self._run = loaded().foregate_route

    def __call__(self, x: Tensor) -> Routing | None:
        """Logits [1, E] (bf16), weights [1, k] and experts [1, k], best first, for D numbers ``x`` (bf16, contiguous);
        None where the last of
        the chosen ties with the next, which routers settle each in its own way. Raises as ``check``."""
        logits = torch.empty(self._logits, dtype=torch.bfloat16)
        weights = torch.empty(self._chosen, dtype=self.dtype)
        experts = torch.empty(self._chosen, dtype=torch.int64)
        code = self._run(
            self._at, x.data_ptr(), self.top_k, self.normalised,
            logits.data_ptr(), experts.data_ptr(), weights.data_ptr(), self.kind,
        )  # fmt: skip
        if code == UNDECIDED:
            return None
        check(code)
        return logits, weights, experts
