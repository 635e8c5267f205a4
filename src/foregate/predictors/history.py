"""Later layers from this token's routing so far, by a window over layers (``history-transformer``, ``history-mlp``) or
from layer to layer (``history-lstm``).

Shapes: L MoE layers, E experts, W window, H hops, d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foregate.errors import PredictorError
from foregate.interfaces import Signals
from foregate.native.asking import LayerKernel
from foregate.native.history import MOST_STATE, EncoderBlock, EncoderKernel, LstmKernel
from foregate.native.predict import Given, Picked, Stage
from foregate.native.products import Products, Rows
from foregate.predictors.activations import layer_norm, relu, sigmoid, softmax
from foregate.predictors.file import Artifact
from foregate.predictors.learned import Floats, RoutedPredictor
from foregate.predictors.network import NetworkPredictor
from foregate.predictors.pending import PendingChoice
from foregate.types import Prediction, PredictorCost, RoutingStep

SOURCE = "pipelined inference with a lightweight gating network"
BLOCKS = 2
NORMS = "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"


class HistoryMlp(RoutedPredictor, NetworkPredictor):
    """Two hidden layers on the flattened window and a one-hot of the layer."""

    name = "history-mlp"
    signal = "routing history of this token"
    source = SOURCE
    default_lookahead = 2

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        window = self._window = int(artifact.option("window", int))
        super().__init__(artifact, lookahead, window - 1)
        first = self.floats("first_weight", None, window * self.width + self.layers)
        size = len(first)
        self._first = Rows(first[:, : -self.layers].T[None])
        self._place = np.ascontiguousarray(first[:, -self.layers :].T + self.floats("first_bias", size))
        self._second = self.linear("second", size, size)
        self._third = self.linear("third", self.hops * self.width, size, asked=True)

    def cost(self) -> PredictorCost:
        parts, picked = (self._second.products, self._third.products), self._window * self.model.top_k
        numbers = picked * self._first.columns + sum(part.size for part in parts)
        return self.multiplied(numbers, picked * self._first.row_bytes + sum(part.nbytes for part in parts))

    def _network(self) -> LayerKernel | None:
        turns = self.model.top_k, self.width
        return self._compiled(self._second, self._third, rows=self._first, start=self._place, turns=turns)

    def _given(self, signals: Signals) -> tuple[Given, Picked | None]:
        return None, (self.ids[signals.layer : signals.layer + self._window], None)

    def _scores(self, signals: Signals) -> Floats:
        layer = signals.layer
        seen = range(max(0, layer + 1 - self._window), layer + 1)
        rows = [self.of_layer(one) + (self._window - 1 - layer + one) * self.width for one in seen]
        inner = self._first.of(0, np.concatenate(rows)).sum(axis=0) + self._place[layer]
        return self._third(0, relu(self._second(0, relu(inner)))).reshape(self.asked, self.width)


class _Awaiting(PendingChoice, RoutedPredictor, NetworkPredictor):
    """Whose kernel itself notes what the layer chose at which it is asked."""

    def _keep(self, step: RoutingStep) -> None:
        RoutedPredictor.observe(self, step)

    def _chosen(self, signals: Signals) -> int | None:
        """Where the kernel finds what this layer chose, unless that is kept."""
        return self._choice(signals, self.model.top_k)[0]

    def _computed(self, signals: Signals) -> Sequence[Prediction]:
        self._settle()
        return super()._computed(signals)


class HistoryTransformer(_Awaiting):
    """Two encoder blocks over the window; the last position's state scores the experts."""

    name = "history-transformer"
    signal = "routing history of this token"
    source = SOURCE
    default_lookahead = 2

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        window = self._window = int(artifact.option("window", int))
        super().__init__(artifact, lookahead, window - 1)
        self._heads = int(artifact.option("heads", int))
        embed = self.floats("embed_weight", None, self.width)
        size = self._size = len(embed)
        if self._heads < 1 or size % self._heads:
            raise PredictorError(f"{artifact.path}: {self._heads} heads do not divide a width of {size}")
        self._embed = Rows(embed.T[None], exact=True)
        self._positions = self.floats("positions", self.layers, size) + self.floats("embed_bias", size)
        self._blocks = [self._block(number) for number in range(BLOCKS)]
        self._head = self.linear("head", self.hops * self.width, size, "linear", asked=True)

    def _block(self, number: int) -> EncoderBlock:
        name = f"blocks_{number}_"
        wide = len(self.floats(f"{name}up_weight", None, self._size))
        shapes = {"qkv": (3 * self._size, self._size), "out": (self._size,) * 2, "up": (wide, self._size)}
        stages = {part: self.linear(name + part, *shape, "linear") for part, shape in shapes.items()}
        norms = [self.floats(name + part, self._size) for part in NORMS]
        return EncoderBlock(**stages, down=self.linear(f"{name}down", self._size, wide), norms=norms)

    def cost(self) -> PredictorCost:
        window, size = min(self._window, self.layers), self._size
        block = sum(stage.products.size for stage in self._blocks[0].stages)
        head, stages = self._head.products, [stage for block in self._blocks for stage in block.stages]
        flops = 2 * ((window + 1) * block + 2 * window * size**2 + head.size)
        nbytes = sum(stage.products.nbytes for stage in stages) + head.nbytes
        return PredictorCost(flops, nbytes + window * self.model.top_k * self._embed.row_bytes, self.parameters)

    def _network(self) -> LayerKernel | None:
        head = self._compiled(self._head)
        stages = [stage for block in self._blocks for stage in block.stages]
        if head is None or self._size > MOST_STATE or not all(stage.products.matrices for stage in stages):
            return None
        return EncoderKernel(head, self._blocks, self._embed, self._positions, self.ids, self._window, self._heads)

    def _given(self, signals: Signals) -> tuple[int | None]:
        return (self._chosen(signals),)

    def _scores(self, signals: Signals) -> Floats:
        layer = signals.layer
        seen = range(max(0, layer + 1 - self._window), layer + 1)
        x = np.stack([self._embed.of(0, self.of_layer(one)).sum(axis=0) for one in seen]) + self._positions[list(seen)]
        x = self._encode(self._blocks[0], x, len(x))
        last = self._encode(self._blocks[1], x, 1)[0]
        return self._head(0, last).reshape(self.asked, self.width)

    def _encode(self, block: EncoderBlock, x: Floats, queries: int) -> Floats:
        """One block; the result is of the last ``queries`` positions of ``x`` [W, d]."""
        window, size = x.shape
        first, first_bias, second, second_bias = block.norms
        q, k, v = _rows(block.qkv, x).reshape(window, 3, self._heads, -1).transpose(1, 2, 0, 3)
        scale = np.float32((size // self._heads) ** -0.5)
        mixed = softmax(q[:, -queries:] @ k.transpose(0, 2, 1) * scale) @ v
        added = _rows(block.out, mixed.transpose(1, 0, 2).reshape(queries, size))
        x = layer_norm(x[-queries:] + added, first, first_bias)
        wide = _rows(block.down, relu(_rows(block.up, x)))
        return layer_norm(x + wide, second, second_bias)


def _rows(stage: Stage, x: Floats) -> Floats:
    return np.stack([stage(0, row).copy() for row in x])


class HistoryLstm(_Awaiting):
    """Two recurrent layers that step from layer to layer of a token; they begin anew at layer 0."""

    name = "history-lstm"
    signal = "routing history of this token"
    source = SOURCE
    default_lookahead = 2

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        size = self._size = self.floats("lstm_weight_hh_l0", None, None).shape[1]
        self._first = Rows(self.floats("lstm_weight_ih_l0", 4 * size, self.width).T[None])
        names = "lstm_weight_hh_l0", "lstm_weight_hh_l1", "lstm_weight_ih_l1"
        self._again, self._again_second, self._second = (
            Products(self.floats(name, 4 * size, size)[None]) for name in names
        )
        self._biases = [
            self.floats(f"lstm_bias_ih_l{n}", 4 * size) + self.floats(f"lstm_bias_hh_l{n}", 4 * size)
            for n in range(BLOCKS)
        ]
        self._head = self.linear("head", self.hops * self.width, size, "linear", asked=True)
        self._states = np.zeros((self.layers, BLOCKS, 2, size), np.float32)
        """Hidden and cell after each layer, of the tokens ``stamps`` [L]."""
        self._stamps = np.zeros(self.layers, np.int64)
        self._stamp = 1

    def cost(self) -> PredictorCost:
        parts = [self._again, self._again_second, self._second, self._head.products]
        numbers = self.model.top_k * self._first.columns + sum(part.size for part in parts)
        nbytes = self.model.top_k * self._first.row_bytes + sum(part.nbytes for part in parts)
        return self.multiplied(numbers, nbytes)

    def reset(self) -> None:
        super().reset()
        self._stamp += 1

    def _begin_token(self) -> None:
        self._stamp += 1

    def _network(self) -> LayerKernel | None:
        head, parts = self._compiled(self._head), (self._again, self._again_second, self._second)
        if head is None or not all(part.matrices for part in parts):
            return None
        return LstmKernel(head, self._first, self._biases, parts, self.ids, self._states, self._stamps)

    def _given(self, signals: Signals) -> tuple[int, int | None]:
        return self._stamp, self._chosen(signals)

    def _scores(self, signals: Signals) -> Floats:
        layer = signals.layer
        last = layer
        while last and self._stamps[last - 1] != self._stamp:
            last -= 1
        for one in range(last, layer + 1):
            self._step(one)
        return self._head(0, self._states[layer, -1, 0]).reshape(self.asked, self.width)

    def _step(self, layer: int) -> None:
        before = self._states[layer - 1] if layer else np.zeros_like(self._states[0])
        now = self._states[layer]
        gates = self._first.of(0, self.of_layer(layer)).sum(axis=0)
        for number, again in enumerate((self._again, self._again_second)):
            hidden, cell = before[number]
            if number:
                gates = self._second(0, now[0, 0]).copy()
            enter, keep, new, leave = (gates + again(0, hidden) + self._biases[number]).reshape(4, self._size)
            now[number, 1] = sigmoid(keep) * cell + sigmoid(enter) * np.tanh(new)
            now[number, 0] = sigmoid(leave) * np.tanh(now[number, 1])
        self._stamps[layer] = self._stamp
