"""Ours: a recurrent model over tokens, fed with the whole routing of each; one small step a token.

Shapes: T tokens, L MoE layers, E experts, H hops, d width.
"""

from __future__ import annotations

import numpy as np

from foregate.interfaces import Signals
from foregate.native.asking import LayerKernel
from foregate.native.history import GruKernel
from foregate.native.predict import Given, Picked, Stage, available
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
        steps = [self.floats(f"gru_weight_{way}_l0", 3 * size, size) for way in ("ih", "hh")]
        self._input, self._again, self._toward = (
            Products(weights[None]) for weights in (*steps, self.floats("ahead_weight", size, size))
        )
        self._biases = self._bias("gru_bias_ih_l0", 3), self._bias("gru_bias_hh_l0", 3)
        within = self.floats("within_weight", size, size)
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
        self._state = np.zeros(size, np.float32)
        self._row = np.zeros(2 * size, np.float32)
        """Of the last token: the sum of its choices, and what the heads see."""
        self._rows = self._row[None]
        """Of the tokens that are observed at once."""
        self._seen, self._whole = self._row[size:], False
        parts = self._input, self._again, self._toward
        compiled = available() and all(part.matrices for part in parts)
        self._gru = GruKernel(parts, self._biases, self._state) if compiled else None

    def _bias(self, name: str, parts: int) -> Floats:
        return self.floats(name, parts * self._size)

    def cost(self) -> PredictorCost:
        parts, head = (self._input, self._again, self._toward), self._head.products
        picked, step = self.model.top_k * 2 * self._size, sum(part.size for part in parts) // self.layers
        nbytes = sum(part.nbytes for part in parts) // self.layers + 4 * picked + head.nbytes
        return self.multiplied(step + picked + head.size, nbytes)

    def reset(self) -> None:
        self._state[:] = 0
        self._row[:] = 0
        self._whole = False

    def observe(self, step: RoutingStep) -> None:
        layer, chosen, count = step.layer, step.experts, len(step.experts)
        if layer == 0:
            if self._whole:
                self._step(self._row)
            if count > 1:
                self._rows = np.tile(self._row, (count, 1))
        if count == 1:
            self._adds.add(layer, chosen[0], None, self._row)
        else:
            real = (chosen >= 0) & (chosen < self.model.experts[layer])
            self._rows += (self._adds.of(layer, np.where(real, chosen, 0)) * real[..., None]).sum(axis=1)
            self._row[:] = self._rows[-1]
        # The heads of the last layer see the state before its token, so that the unit steps when the next one begins.
        self._whole = layer == self.layers - 1
        if self._whole and count > 1:
            for row in self._rows[:-1]:
                self._step(row)

    def _step(self, row: Floats) -> None:
        """The state after one more token, whose choices add up to the first half of ``row`` [2 d]: it becomes that of
        the next token."""
        if self._gru is not None:
            self._gru(row)
            return
        size, state = self._size, self._state
        inputs = self._input(0, silu(row[:size])) + self._biases[0]
        again = self._again(0, state) + self._biases[1]
        forget, update = sigmoid(inputs[: 2 * size] + again[: 2 * size]).reshape(2, size)
        new = np.tanh(inputs[2 * size :] + forget * again[2 * size :])
        state[:] = (1 - update) * new + update * state
        row[:size], row[size:] = 0, self._toward(0, state)

    def _network(self) -> LayerKernel | None:
        return self._compiled(self._head, start=self._place)

    def _given(self, signals: Signals) -> tuple[Given, Picked | None]:
        return self._seen, None

    def _scores(self, signals: Signals) -> Floats:
        seen = self._seen + self._place[signals.layer]
        return self._head(signals.layer, silu(seen)).reshape(self.asked, self.width)
