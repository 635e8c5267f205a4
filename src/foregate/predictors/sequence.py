"""Ours: a recurrent model over tokens, fed with the whole routing of each; one small step a token.

Shapes: T tokens, L MoE layers, E experts, H hops, d width.
"""

from __future__ import annotations

import numpy as np

from foregate.interfaces import Signals
from foregate.native.predict import Given, NetworkKernel, Picked, Stage
from foregate.native.products import Products, Rows
from foregate.predictors.activations import sigmoid, silu
from foregate.predictors.file import Artifact
from foregate.predictors.learned import Floats, LearnedPredictor
from foregate.predictors.network import NetworkPredictor
from foregate.types import PredictorCost, RoutingStep


class Sequence(LearnedPredictor, NetworkPredictor):
    """Every choice adds its row of ``embed`` [L, E, d] to a running sum of the token; after the last layer a gated
    recurrent unit takes silu of it. State and sum together score later layers (``head``) and the next token's."""

    name = "sequence"
    signal = "routing of this token and all before"
    source = "ours"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        layers, experts = self.layers, self.width
        embed = self.floats("embed", layers, experts, None)
        size = self._size = embed.shape[-1]
        self._input, self._input_bias = self.floats("gru_weight_ih_l0", 3 * size, size), self._bias("gru_bias_ih_l0", 3)
        self._again, self._again_bias = self.floats("gru_weight_hh_l0", 3 * size, size), self._bias("gru_bias_hh_l0", 3)
        self._toward, within = self.floats("ahead_weight", size, size), self.floats("within_weight", size, size)
        # A choice adds to the token's sum and, through ``within``, to what the heads see.
        self._adds = Rows(self.none_padded(np.concatenate([embed, embed @ within.T], axis=2)), exact=True)
        self._place = self.floats("layer", layers, size) + self._bias("ahead_bias", 1) + self._bias("within_bias", 1)
        # Layer L + m is layer m of the next token, which has a head of its own.
        heads = [self.floats(name, layers, experts, size) for name in ("head", "next_head")]
        biases = [self.floats(name, layers, experts) for name in ("head_bias", "next_bias")]
        asked = self.asked = min(self.asked, layers)
        rows = np.arange(layers)[:, None] + np.arange(1, asked + 1)
        self._head = Stage(
            Products(np.concatenate(heads)[rows].reshape(layers, -1, size)),
            np.concatenate(biases)[rows].reshape(layers, -1),
            "silu",
        )
        self._start()

    def _bias(self, name: str, parts: int) -> Floats:
        return self.floats(name, parts * self._size)

    def _start(self) -> None:
        self._state = np.zeros(self._size, np.float32)
        self._from_state = np.zeros(self._size, np.float32)
        self._sum = np.zeros((1, 2 * self._size), np.float32)

    def cost(self) -> PredictorCost:
        step = (self._input.size + self._again.size + self._toward.size) // self.layers
        picked, head = self.model.top_k * 2 * self._size, self._head.products
        return self.multiplied(step + picked + head.size, 4 * (step + picked) + head.nbytes)

    def reset(self) -> None:
        self._start()

    def observe(self, step: RoutingStep) -> None:
        layer = step.layer
        if layer == 0:
            self._sum = np.zeros((len(step.experts), 2 * self._size), np.float32)
            self._sum[:, self._size :] = self._from_state
        if len(step.experts) == 1:
            self._adds.add(layer, step.experts[0], None, self._sum[0])
        else:
            real = (step.experts >= 0) & (step.experts < self.model.experts[layer])
            rows = self._adds.of(layer, np.where(real, step.experts, 0))
            self._sum += (rows * real[..., None]).sum(axis=1)
        if layer == self.layers - 1:
            for inputs in silu(self._sum[:, : self._size]) @ self._input.T + self._input_bias:
                self._state = self._step(inputs)
            self._from_state = self._toward @ self._state

    def _step(self, inputs: Floats) -> Floats:
        """The state after one more token; ``inputs`` [3 d] are its own part of the gates."""
        size = len(self._state)
        again = self._again @ self._state + self._again_bias
        forget, update = sigmoid(inputs[: 2 * size] + again[: 2 * size]).reshape(2, size)
        new = np.tanh(inputs[2 * size :] + forget * again[2 * size :])
        return (1 - update) * new + update * self._state

    def _network(self) -> NetworkKernel | None:
        return self._compiled(self._head, start=self._place)

    def _given(self, signals: Signals) -> tuple[Given, Picked | None]:
        # At the last layer the state has stepped already; this has the one before, on which the heads were trained.
        return self._sum[-1, self._size :], None

    def _scores(self, signals: Signals) -> Floats:
        seen = self._sum[-1, self._size :] + self._place[signals.layer]
        return self._head(signals.layer, silu(seen)).reshape(self.asked, self.width)
