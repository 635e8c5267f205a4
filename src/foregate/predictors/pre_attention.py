"""The experts of a layer from the input of its own attention: one small network a layer.

Shapes: L MoE layers, E experts, D hidden, F width of the network.
"""

from __future__ import annotations

import numpy as np

from foregate.errors import PredictorError
from foregate.interfaces import Signals
from foregate.native.asking import LayerKernel
from foregate.native.predict import Given, Picked, Stage
from foregate.native.products import Products
from foregate.predictors.activations import gelu, silu
from foregate.predictors.file import Artifact
from foregate.predictors.learned import Floats, LearnedPredictor
from foregate.predictors.network import NetworkPredictor
from foregate.types import Moment, PredictorCost

ACTIVATIONS = {"silu": silu, "gelu": gelu}


def _activation(artifact: Artifact) -> str:
    name: str = artifact.option("activation", str)
    if name not in ACTIVATIONS:
        raise PredictorError(f"{artifact.path}: option 'activation' is {name!r}; known: {', '.join(ACTIVATIONS)}")
    return name


class PreAttention(LearnedPredictor, NetworkPredictor):
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
        first = self.floats("first", self.layers, inputs, None)
        hidden = first.shape[-1]
        second = self.floats("second", self.layers, hidden, self.width)
        biases = self.floats("first_bias", self.layers, hidden), self.floats("second_bias", self.layers, self.width)
        self._first = Stage(Products(first.transpose(0, 2, 1)), biases[0], "linear")
        self._second = Stage(Products(second.transpose(0, 2, 1)), biases[1], _activation(artifact))
        self._last = np.zeros((self.layers, self.hidden_size), np.float32)

    def cost(self) -> PredictorCost:
        first, second = self._first.products, self._second.products
        return self.multiplied(first.size + second.size, first.nbytes + second.nbytes)

    def reset(self) -> None:
        self._last[:] = 0

    def _network(self) -> LayerKernel | None:
        return self._compiled(self._first, self._second)

    def _given(self, signals: Signals) -> tuple[Given, Picked | None]:
        where = None if self._previous else signals.addresses("pre_attention", numbers=self.hidden_size)
        if where is None:
            return self._input(signals), None
        (at,), dtype = where
        return (at, dtype), None

    def _input(self, signals: Signals) -> Floats:
        """What the first map reads."""
        now = self.told(signals, "pre_attention")
        if not self._previous:
            return now
        given = np.concatenate([now, self._last[signals.layer]])
        self._last[signals.layer] = now
        return given

    def _scores(self, signals: Signals) -> Floats:
        given = self._input(signals)
        inner = ACTIVATIONS[self._second.activation](self._first(signals.layer, given))
        return self._second(signals.layer, inner)[None]
