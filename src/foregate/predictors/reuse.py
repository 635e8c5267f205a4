"""Which experts of a layer the next tokens will need again: advice for the eviction policy ``echo``, trained on its
features and on the residual stream. Part of the file of ``fusion``. No torch.

Shapes: L MoE layers, E experts of the widest layer, D hidden, R width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.errors import PredictorError
from foregate.interfaces import Signals
from foregate.native.library import function
from foregate.native.matrix import F32
from foregate.native.predict import NetworkKernel, Stage, available, loaded
from foregate.native.products import Products
from foregate.predictors.activations import inverse_rms, silu
from foregate.predictors.file import Artifact

Floats = NDArray[np.float32]

PREFIX = "reuse_"
"""Of the names of its arrays."""
POLICY_FEATURES = 5
"""What ``experts.echo`` weighs: see ``Echo.features``."""


class Reuse:
    """advice = outward silu(inward u), with u = r / rms(r) of the residual r at the layer. With ``own`` [5] times the
    policy's features, it is the log-odds of exp(-(tokens to the next use - 1) / PATIENCE)."""

    def __init__(self, artifact: Artifact) -> None:
        """Raises PredictorError where an array is missing or of another shape."""
        model = artifact.model
        layers, hidden, experts = model.layers, model.hidden_size, max(model.experts)
        self._hidden, self._experts = hidden, model.experts

        def floats(name: str, *shape: int | None) -> Floats:
            return np.ascontiguousarray(artifact.array(PREFIX + name, shape), np.float32)

        self._own = floats("own", layers, POLICY_FEATURES)
        inward = floats("inward_weight", layers, hidden, None)
        outward = floats("outward_weight", layers, inward.shape[-1], experts)
        self._stages = [
            Stage(Products(inward.transpose(0, 2, 1)), floats("inward_bias", layers, inward.shape[-1]), "linear"),
            Stage(Products(outward.transpose(0, 2, 1)), floats("outward_bias", layers, experts), "silu"),
        ]
        self._advice = [np.zeros(there, np.float32) for there in model.experts]
        self._kernel = self._compiled() if available() else None

    def _compiled(self) -> NetworkKernel | None:
        if not all(stage.products.matrices for stage in self._stages):
            return None
        experts = self._experts
        ones = np.ones((len(experts), 1, self._hidden), np.float32)
        ahead = [[layer] for layer in range(len(experts))]
        kernel = NetworkKernel(self._stages, experts, ahead, 1, max(experts), norms=ones)
        self._scores, self._order = np.zeros(max(experts), np.float32), np.zeros(max(experts), np.int32)
        self._to = self._scores.ctypes.data, self._order.ctypes.data
        self._run: Any = function(loaded(), "foregate_predict_network", 9)
        self._places = [kernel.place(layer) for layer in range(len(experts))]
        return kernel

    def __call__(self, signals: Signals) -> tuple[Floats, Floats]:
        """Advice [E] on the layer at hand, overwritten by the next on it, and the weights [5] that go with it."""
        where = None if self._kernel is None else signals.addresses("residual", numbers=self._hidden)
        if where is None:
            return self.on(signals.layer, signals.hidden("residual"))
        (at,), dtype = where
        return self._told(signals.layer, at, dtype)

    def on(self, layer: int, residual: Floats) -> tuple[Floats, Floats]:
        """The same for a ``residual`` [D] of ``layer``; what an inflated model has beyond D is left out. Raises
        PredictorError for a shorter one."""
        if len(residual) < self._hidden:
            raise PredictorError(f"a residual of {len(residual)} numbers, where advice is by {self._hidden}")
        residual = residual[: self._hidden]
        if self._kernel is not None:
            row = np.ascontiguousarray(residual, np.float32)
            return self._told(layer, row.ctypes.data, F32)
        inward, outward = self._stages
        inner = silu(inward(layer, residual * np.float32(inverse_rms(residual))))
        self._advice[layer][:] = outward(layer, inner)[: self._experts[layer]]
        return self._advice[layer], self._own[layer]

    def _told(self, layer: int, at: int, dtype: int) -> tuple[Floats, Floats]:
        """What the kernel gives for numbers of ``dtype`` that lie ``at`` an address."""
        if self._run(self._places[layer], at, dtype, None, None, 0, *self._to, 1):
            raise MemoryError("no memory for advice")
        advice = self._advice[layer]
        there = len(advice)
        advice[self._order[:there]] = self._scores[:there]
        return advice, self._own[layer]


def has_reuse(artifact: Artifact) -> bool:
    """Whether the file of a predictor says anything about reuse."""
    return any(name.startswith(PREFIX) for name in artifact.arrays)


def reuse_of(artifact: Artifact) -> Reuse | None:
    """What it says, if anything. Raises PredictorError."""
    return Reuse(artifact) if has_reuse(artifact) else None
