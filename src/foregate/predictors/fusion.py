"""Ours: a copy of the later router, on a guess of its input that was trained on the experts a cache lacks.

Shapes: L MoE layers, E experts, D hidden, H hops, R width of the correction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foregate.interfaces import Signals
from foregate.native.predict import FusionKernel, available
from foregate.native.products import Products
from foregate.predictors.activations import inverse_rms, silu
from foregate.predictors.file import Artifact
from foregate.predictors.learned import Floats, RoutedPredictor
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
        asked = self._asked = min(lookahead, hops)
        inward = self.floats("inward_weight", layers, 2 * hidden + experts, None)
        width = inward.shape[-1]
        before = self.floats("before_weight", layers, hops * hidden, width)
        self._dense = Products(np.concatenate([inward[:, : 2 * hidden], before], axis=1).transpose(0, 2, 1))
        self._gains = self._dense.x[2 * hidden :].reshape(hops, hidden)
        dense_bias = self.floats("inward_bias", layers, width) + self.floats("before_bias", layers, width)
        # What depends on the chosen experts alone: rows to pick and weigh, no product over all experts.
        outward = self.floats("experts_weight", layers, experts, hops * hidden)[..., : asked * hidden]
        self._picked = np.concatenate(
            [inward[:, 2 * hidden :], self.floats("gate_weight", layers, experts, width), outward], axis=2
        )
        gate_bias = self.floats("gate_bias", layers, width) + 1
        shift = self.floats("experts_bias", layers, hops * hidden) + self.floats("outward_bias", layers, hops * hidden)
        self._picked_bias = np.concatenate([dense_bias, gate_bias, shift[:, : asked * hidden]], axis=1)
        direct = self.floats("direct_weight", layers, width, hops * experts)[..., : asked * experts]
        further = self.floats("outward_weight", layers, width, hops * hidden)[..., : asked * hidden]
        self._outward = Products(np.concatenate([further, direct], axis=2).transpose(0, 2, 1))
        direct_bias = self.floats("direct_bias", layers, hops * experts).reshape(layers, hops, experts)[:, :asked]
        router = self.floats("router", layers, hops, experts, hidden)[:, :asked]
        self._router = Products(router.reshape(layers * asked, experts, hidden))
        self._bias = np.ascontiguousarray(self.floats("router_bias", layers, hops, experts)[:, :asked] + direct_bias)
        self._repeat = np.ascontiguousarray(self.floats("repeat", layers, hops, experts, experts)[:, :asked])
        self._size = width
        self._now = np.zeros((layers, hidden), np.float32)
        self._last = np.zeros((layers, hidden), np.float32)
        tables = self._picked, self._picked_bias, self._bias, self._repeat
        state = self._now, self._last, self.chosen
        compiled = available() and self._dense.matrices and self._outward.matrices and self._router.matrices
        self._kernel = FusionKernel(self._dense, self._outward, self._router, tables, state, hops) if compiled else None

    def cost(self) -> PredictorCost:
        picked = self.model.top_k * (self._picked.shape[-1] + self._asked * self.width)
        parts = [self._dense, self._outward, *[self._router] * self._asked]
        numbers, nbytes = sum(part.size for part in parts), sum(part.nbytes for part in parts)
        return self.multiplied(picked + numbers, 4 * picked + nbytes)

    def reset(self) -> None:
        super().reset()
        self._now[:] = 0
        self._last[:] = 0

    def observe(self, step: RoutingStep) -> None:
        super().observe(step)
        if step.layer == 0:
            self._last[:] = self._now

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        layer, before = signals.layer, self.told(signals, "pre_attention")
        self._now[layer] = self.told(signals, "residual")
        if self._kernel is None:
            return self.ranked(signals, self._scores(layer, before))
        return self.ranked(signals, self._kernel(layer, before, self.ids, self.weights))

    def _scores(self, layer: int, before: Floats) -> Floats:
        """What the kernel computes, [A, E]."""
        hidden, size, seen = self.hidden_size, self._size, self._dense.x
        residual, unit = self._now[layer], seen[:hidden]
        np.multiply(residual, inverse_rms(residual), out=unit)
        seen[hidden : 2 * hidden] = before
        self._gain(layer)
        picked = self.weights.dot(self._picked[layer].take(self.ids, axis=0)) + self._picked_bias[layer]
        inner = silu(self._dense.of(layer) + picked[:size]) * picked[size : 2 * size]
        out = self._outward(layer, inner)
        shifts = out[: self._asked * hidden] + picked[2 * size :]
        scores: Floats = out[self._asked * hidden :].reshape(self._asked, -1) + self._bias[layer]
        for hop in range(self._asked):
            guess = unit + shifts[hop * hidden : (hop + 1) * hidden]
            scores[hop] += self._router(layer * self._asked + hop, guess) * inverse_rms(guess)
            scores[hop] += self.chosen[(layer + hop + 1) % self.layers].dot(self._repeat[layer, hop])
        return scores

    def _gain(self, layer: int) -> None:
        """Write what the last token's residual gained up to each hop, [H, D]; zero beyond the last layer."""
        base, known = self._last[layer], min(self.hops, self.layers - layer - 1)
        self._gains[:known] = (self._last[layer + 1 : layer + 1 + known] - base) * inverse_rms(base)
        self._gains[known:] = 0
