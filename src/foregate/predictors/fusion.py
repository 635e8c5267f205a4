"""Ours: a copy of the later router, on a guess of its input that was trained on the experts a cache lacks.

Shapes: L MoE layers, E experts, D hidden, H hops, R width of the correction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foregate.interfaces import Signals
from foregate.predictors.activations import silu, unit_rms
from foregate.predictors.file import Artifact
from foregate.predictors.learned import RoutedPredictor
from foregate.types import Prediction, PredictorCost, RoutingStep


class Fusion(RoutedPredictor):
    """With u = r_l / rms(r_l), x the pre-attention input, g the router weights of the chosen experts, and p_h what the
    last token's residual gained from layer l to l+h (in units of its rms at l):

    z = silu(inward [u; x; g] + before [p_1 … p_H]) * (1 + gate g), all per layer;
    q_h = u + outward_h z + experts_h g, the guessed residual of layer l+h;
    scores_h = router_h q_h / rms(q_h) + direct_h z + repeat_h c_h, with c_h what layer l+h chose last.
    """

    name = "fusion"
    signal = "residual, pre-attention input, routing"
    source = "ours"

    def __init__(self, artifact: Artifact, lookahead: int) -> None:
        super().__init__(artifact, lookahead)
        layers, hops, experts, hidden = self.layers, self.hops, self.width, self.hidden_size
        inward = self.floats("inward_weight", layers, 2 * hidden + experts, None)
        width = inward.shape[-1]
        before = self.floats("before_weight", layers, hops * hidden, width)
        self._dense = np.concatenate([inward[:, : 2 * hidden], before], axis=1)
        self._dense_bias = self.floats("inward_bias", layers, width) + self.floats("before_bias", layers, width)
        # What depends on the chosen experts alone: rows to pick and weigh, no product over all experts.
        outward = self.floats("experts_weight", layers, experts, hops * hidden)
        self._picked = np.concatenate(
            [inward[:, 2 * hidden :], self.floats("gate_weight", layers, experts, width), outward], axis=2
        )
        gate_bias = self.floats("gate_bias", layers, width) + 1
        shift = self.floats("experts_bias", layers, hops * hidden) + self.floats("outward_bias", layers, hops * hidden)
        self._picked_bias = np.concatenate([self._dense_bias, gate_bias, shift], axis=1)
        direct = self.floats("direct_weight", layers, width, hops * experts)
        self._outward = np.concatenate([self.floats("outward_weight", layers, width, hops * hidden), direct], axis=2)
        direct_bias = self.floats("direct_bias", layers, hops * experts).reshape(layers, hops, experts)
        self._router = self.floats("router", layers, hops, experts, hidden)
        self._bias = self.floats("router_bias", layers, hops, experts) + direct_bias
        self._repeat = self.floats("repeat", layers, hops, experts, experts)
        self._size = width
        self._now = np.zeros((layers, hidden), np.float32)
        self._last = np.zeros((layers, hidden), np.float32)
        self._ids: list[np.ndarray] = [np.zeros(0, np.int64)] * layers

    def cost(self) -> PredictorCost:
        picked = self.model.top_k * (self._picked.shape[-1] + self.hops * self.width)
        return self.multiplied(self._dense[0].size + self._outward[0].size + self._router[0].size + picked)

    def reset(self) -> None:
        super().reset()
        self._now[:] = 0
        self._last[:] = 0
        self._ids = [np.zeros(0, np.int64)] * self.layers

    def observe(self, step: RoutingStep) -> None:
        super().observe(step)
        self._ids[step.layer] = self.ids
        if step.layer == 0:
            self._now, self._last = self._last, self._now

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        layer, hidden, hops = signals.layer, self.hidden_size, self.hops
        residual = self.told(signals, "residual")
        self._now[layer] = residual
        unit = unit_rms(residual)
        seen = np.concatenate([unit, self.told(signals, "pre_attention"), *self._gains(layer)])
        picked = self.weights @ self._picked[layer][self.ids] + self._picked_bias[layer]
        size = self._size
        inner = silu(seen @ self._dense[layer] + picked[:size]) * picked[size : 2 * size]
        out = inner @ self._outward[layer]
        guess = unit_rms(unit + (out[: hops * hidden] + picked[2 * size :]).reshape(hops, hidden))
        scores = np.matmul(self._router[layer], guess[:, :, None])[..., 0] + self._bias[layer]
        scores += out[hops * hidden :].reshape(hops, -1)
        for hop in range(hops):
            history = self._ids[(layer + hop + 1) % self.layers]
            if len(history):
                scores[hop] += self._repeat[layer, hop][history].sum(axis=0)
        return self.ranked(signals, scores)

    def _gains(self, layer: int) -> list[np.ndarray]:
        """What the last token's residual gained up to each hop, [D] each; zero beyond the last layer."""
        base = self._last[layer]
        scale = 1 / np.sqrt(base @ base / np.float32(len(base)) + np.float32(1e-9))
        gains = []
        for hop in range(1, self.hops + 1):
            known = layer + hop < self.layers
            gains.append((self._last[layer + hop] - base) * scale if known else np.zeros_like(base))
        return gains
