"""Later layers from this token's routing so far, by a window over layers: ``history-transformer`` and ``history-mlp``.

Shapes: L MoE layers, E experts, W window, H hops, d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foregate.interfaces import Signals
from foregate.predictors.activations import layer_norm, relu, sigmoid, softmax
from foregate.predictors.file import Artifact
from foregate.predictors.learned import Floats, RoutedPredictor
from foregate.types import Prediction, PredictorCost, RoutingStep

SOURCE = "pipelined inference with a lightweight gating network"
BLOCKS = 2


class HistoryMlp(RoutedPredictor):
    """Two hidden layers on the flattened window and a one-hot of the layer."""

    name = "history-mlp"
    signal = "routing history of this token"
    source = SOURCE
    default_lookahead = 2

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        self._window = int(artifact.option("window", int))
        inputs = self._window * self.width + self.layers
        first = self.floats("first_weight", None, inputs)
        size = len(first)
        self._first = np.ascontiguousarray(first[:, : -self.layers].T)
        self._place = first[:, -self.layers :].T + self.floats("first_bias", size)
        self._second, self._second_bias = self.floats("second_weight", size, size), self.floats("second_bias", size)
        outputs = self.hops * self.width
        self._third, self._third_bias = self.floats("third_weight", outputs, size), self.floats("third_bias", outputs)

    def cost(self) -> PredictorCost:
        return self.multiplied(self._first.size + self._second.size + self._third.size)

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        layer = signals.layer
        seen = self.chosen[max(0, layer + 1 - self._window) : layer + 1].ravel()
        hidden = relu(seen @ self._first[len(self._first) - len(seen) :] + self._place[layer])
        hidden = relu(self._second @ hidden + self._second_bias)
        return self.ranked(signals, (self._third @ hidden + self._third_bias).reshape(self.hops, self.width))


class HistoryTransformer(RoutedPredictor):
    """Two encoder blocks over the window; the last position's state scores the experts."""

    name = "history-transformer"
    signal = "routing history of this token"
    source = SOURCE
    default_lookahead = 2

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        self._window, self._heads = int(artifact.option("window", int)), int(artifact.option("heads", int))
        embed = self.floats("embed_weight", None, self.width)
        size = self._size = len(embed)
        self._embed = np.ascontiguousarray(embed.T)
        self._positions = self.floats("positions", self.layers, size) + self.floats("embed_bias", size)
        self._blocks = [self._block(number) for number in range(BLOCKS)]
        self._head = self.floats("head_weight", self.hops * self.width, size)
        self._head_bias = self.floats("head_bias", self.hops * self.width)

    def _block(self, number: int) -> dict[str, Floats]:
        """The arrays of one block by their short names; matrices transposed, [in, out]."""
        found = {}
        for name in ("qkv", "out", "up", "down"):
            weight = self.floats(f"blocks_{number}_{name}_weight", None, None)
            found[name] = np.ascontiguousarray(weight.T)
            found[f"{name}_bias"] = self.floats(f"blocks_{number}_{name}_bias", len(weight))
        for name in ("norm1", "norm2"):
            found[name] = self.floats(f"blocks_{number}_{name}_weight", self._size)
            found[f"{name}_bias"] = self.floats(f"blocks_{number}_{name}_bias", self._size)
        return found

    def cost(self) -> PredictorCost:
        window = min(self._window, self.layers)
        block = sum(self._blocks[0][name].size for name in ("qkv", "out", "up", "down"))
        flops = 2 * ((window + 1) * block + 2 * window * self._size**2 + self._head.size)
        return PredictorCost(flops, 4 * self.parameters, self.parameters)

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        layer = signals.layer
        rows = slice(max(0, layer + 1 - self._window), layer + 1)
        x = self.chosen[rows] @ self._embed + self._positions[rows]
        x = self._encode(self._blocks[0], x, len(x))
        last = self._encode(self._blocks[1], x, 1)[0]
        return self.ranked(signals, (self._head @ last + self._head_bias).reshape(self.hops, self.width))

    def _encode(self, block: dict[str, Floats], x: Floats, queries: int) -> Floats:
        """One block; the result is of the last ``queries`` positions of ``x`` [W, d]."""
        window, size = x.shape
        q, k, v = (x @ block["qkv"] + block["qkv_bias"]).reshape(window, 3, self._heads, -1).transpose(1, 2, 0, 3)
        scale = np.float32((size // self._heads) ** -0.5)
        mixed = softmax(q[:, -queries:] @ k.transpose(0, 2, 1) * scale) @ v
        added = mixed.transpose(1, 0, 2).reshape(queries, size) @ block["out"] + block["out_bias"]
        x = layer_norm(x[-queries:] + added, block["norm1"], block["norm1_bias"])
        wide = relu(x @ block["up"] + block["up_bias"]) @ block["down"] + block["down_bias"]
        return layer_norm(x + wide, block["norm2"], block["norm2_bias"])


class HistoryLstm(RoutedPredictor):
    """Two recurrent layers that step from layer to layer of a token; they begin anew at layer 0."""

    name = "history-lstm"
    signal = "routing history of this token"
    source = SOURCE
    default_lookahead = 2

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        recurrent = self.floats("lstm_weight_hh_l0", None, None)
        size = self._size = recurrent.shape[1]
        first = self.floats("lstm_weight_ih_l0", 4 * size, self.width)
        second = self.floats("lstm_weight_ih_l1", 4 * size, size)
        again = self.floats("lstm_weight_hh_l1", 4 * size, size)
        self._weights = [np.concatenate([first, recurrent], axis=1), np.concatenate([second, again], axis=1)]
        self._biases = [
            self.floats(f"lstm_bias_ih_l{n}", 4 * size) + self.floats(f"lstm_bias_hh_l{n}", 4 * size)
            for n in range(BLOCKS)
        ]
        self._head = self.floats("head_weight", self.hops * self.width, size)
        self._head_bias = self.floats("head_bias", self.hops * self.width)
        self._state = np.zeros((BLOCKS, 2, size), np.float32)

    def cost(self) -> PredictorCost:
        return self.multiplied(sum(weight.size for weight in self._weights) + self._head.size)

    def reset(self) -> None:
        super().reset()
        self._state[:] = 0

    def observe(self, step: RoutingStep) -> None:
        super().observe(step)
        if step.layer == 0:
            self._state[:] = 0
        x = self.chosen[step.layer]
        for number in range(BLOCKS):
            hidden, cell = self._state[number]
            gates = self._weights[number] @ np.concatenate([x, hidden]) + self._biases[number]
            enter, keep, new, leave = gates.reshape(4, self._size)
            cell[:] = sigmoid(keep) * cell + sigmoid(enter) * np.tanh(new)
            hidden[:] = sigmoid(leave) * np.tanh(cell)
            x = hidden

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        scores = self._head @ self._state[-1, 0] + self._head_bias
        return self.ranked(signals, scores.reshape(self.hops, self.width))
