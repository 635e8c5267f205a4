"""Ours: a recurrent model over tokens, fed with the whole routing of each; one small step a token.

Shapes: T tokens, L MoE layers, E experts, H hops, d width.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np

from foregate.interfaces import Signals
from foregate.predictors.activations import sigmoid, silu
from foregate.predictors.file import Artifact
from foregate.predictors.learned import Floats, LearnedPredictor
from foregate.types import Prediction, PredictorCost, RoutingStep


class Sequence(LearnedPredictor):
    """Every choice adds its row of ``embed`` [L, E, d] to a running sum of the token; after the last layer a gated
    recurrent unit takes silu of it. State and sum together score later layers (``head``) and the next token's."""

    name = "sequence"
    signal = "routing of this token and all before"
    source = "ours"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        layers, experts = self.layers, self.width
        self._embed = self.floats("embed", layers, experts, None)
        size = self._embed.shape[-1]
        self._input, self._input_bias = self.floats("gru_weight_ih_l0", 3 * size, size), self._bias("gru_bias_ih_l0", 3)
        self._again, self._again_bias = self.floats("gru_weight_hh_l0", 3 * size, size), self._bias("gru_bias_hh_l0", 3)
        self._ahead, self._within = self.floats("ahead_weight", size, size), self.floats("within_weight", size, size)
        self._place = self.floats("layer", layers, size) + self._bias("ahead_bias", 1) + self._bias("within_bias", 1)
        # Layer L + m is layer m of the next token, which has a head of its own.
        heads = [self.floats(name, layers, experts, size) for name in ("head", "next_head")]
        biases = [self.floats(name, layers, experts) for name in ("head_bias", "next_bias")]
        self._head, self._head_bias = np.concatenate(heads), np.concatenate(biases)
        self._start()

    def _bias(self, name: str, parts: int) -> Floats:
        return self.floats(name, parts * self._embed.shape[-1])

    def _start(self) -> None:
        size = self._embed.shape[-1]
        self._state = np.zeros(size, np.float32)
        self._from_state = self._after = np.zeros(size, np.float32)
        self._sum = np.zeros((1, size), np.float32)

    def cost(self) -> PredictorCost:
        step = (self._input.size + self._again.size + self._ahead.size) // self.layers
        return self.multiplied(step + self._within.size + self.lookahead * self._head[0].size)

    def reset(self) -> None:
        self._start()

    def observe(self, step: RoutingStep) -> None:
        layer = step.layer
        if layer == 0:
            self._sum = np.zeros((len(step.experts), self._embed.shape[-1]), np.float32)
        real = (step.experts >= 0) & (step.experts < self.model.experts[layer])
        rows = self._embed[layer][np.where(real, step.experts, 0)]
        self._sum += (rows * real[..., None]).sum(axis=1)
        if layer == self.layers - 1:
            for inputs in silu(self._sum) @ self._input.T + self._input_bias:
                self._state = self._step(inputs)
            self._after = self._from_state
            self._from_state = self._ahead @ self._state

    def _step(self, inputs: Floats) -> Floats:
        """The state after one more token; ``inputs`` [3 d] are its own part of the gates."""
        size = len(self._state)
        again = self._again @ self._state + self._again_bias
        forget, update = sigmoid(inputs[: 2 * size] + again[: 2 * size]).reshape(2, size)
        new = np.tanh(inputs[2 * size :] + forget * again[2 * size :])
        return (1 - update) * new + update * self._state

    def predict(self, signals: Signals) -> Many[Prediction]:
        layer = signals.layer
        # At the last layer the state has stepped already; the heads were trained on the one before.
        before = self._after if layer == self.layers - 1 else self._from_state
        inner = silu(before + self._within @ self._sum[-1] + self._place[layer])
        rows = slice(layer + 1, layer + 1 + self.lookahead)
        scores = self._head[rows] @ inner + self._head_bias[rows]
        return self.ranked(signals, scores)
