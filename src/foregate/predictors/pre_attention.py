"""The experts of a layer from the input of its own attention: one small network a layer.

Shapes: L MoE layers, E experts, D hidden, F width of the network.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foregate.errors import PredictorError
from foregate.interfaces import Signals
from foregate.native.predict import NetworkKernel, available
from foregate.native.products import Products
from foregate.predictors.activations import gelu, silu
from foregate.predictors.file import Artifact
from foregate.predictors.learned import Floats, LearnedPredictor
from foregate.types import Moment, Prediction, PredictorCost

ACTIVATIONS = {"silu": silu, "gelu": gelu}


def _activation(artifact: Artifact) -> str:
    name: str = artifact.option("activation", str)
    if name not in ACTIVATIONS:
        raise PredictorError(f"{artifact.path}: option 'activation' is {name!r}; known: {', '.join(ACTIVATIONS)}")
    return name


class PreAttention(LearnedPredictor):
    """Arrays ``first`` [L, D, F] and ``second`` [L, F, E] with their biases; a batch norm is folded into the first.

    With option ``previous`` the first map reads the last token's input of this layer as well, [L, 2 D, F].
    """

    name = "pre-attention"
    signal = "pre-attention input"
    moment = Moment.BEFORE_ATTENTION
    default_lookahead = 0
    source = "pre-attention expert prediction"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        self._previous = bool(artifact.option("previous", bool))
        inputs = self.hidden_size * (2 if self._previous else 1)
        self._activation = _activation(artifact)
        first = self.floats("first", self.layers, inputs, None)
        hidden = first.shape[-1]
        self._first = Products(first.transpose(0, 2, 1))
        self._first_bias = self.floats("first_bias", self.layers, hidden)
        self._second = Products(self.floats("second", self.layers, hidden, self.width).transpose(0, 2, 1))
        self._second_bias = self.floats("second_bias", self.layers, self.width)
        self._last = np.zeros((self.layers, self.hidden_size), np.float32)
        self._kernel = self._compiled() if available() and self._first.matrices and self._second.matrices else None

    def _compiled(self) -> NetworkKernel:
        products, biases = (self._first, self._second), (self._first_bias, self._second_bias)
        return NetworkKernel(products, biases, self._activation, self.model.experts, self.named)

    def name_at_most(self, count: int) -> None:
        super().name_at_most(count)
        self._kernel = None if self._kernel is None else self._compiled()

    def cost(self) -> PredictorCost:
        return self.multiplied(self._first.size + self._second.size, self._first.nbytes + self._second.nbytes)

    def reset(self) -> None:
        self._last[:] = 0

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        layer, size = signals.layer, self.hidden_size
        x = self._first.x if self._kernel is None else self._kernel.x
        x[:size] = self.told(signals, "pre_attention")
        if self._previous:
            x[size:] = self._last[layer]
            self._last[layer] = x[:size]
        return [self.rank(layer, self._scores(layer))] if self._kernel is None else self._kernel(layer)

    def _scores(self, layer: int) -> Floats:
        """What the kernel computes, [E]."""
        inner = ACTIVATIONS[self._activation](self._first.of(layer) + self._first_bias[layer])
        scores: Floats = self._second(layer, inner) + self._second_bias[layer]
        return scores
