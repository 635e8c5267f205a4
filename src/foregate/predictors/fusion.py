"""Ours: a copy of the later router, on a guess of its input that was trained on the experts a cache lacks.

Shapes: L MoE layers, E experts, D hidden, H hops, R width of the correction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from foregate.interfaces import Signals
from foregate.native.matrix import F32, INT4
from foregate.native.predict import FusionKernel, available
from foregate.native.products import Products, Rows
from foregate.predictors.activations import inverse_rms, silu
from foregate.predictors.file import Artifact
from foregate.predictors.fitted import NOBODY
from foregate.predictors.learned import Floats, LearnedPredictor
from foregate.predictors.pending import PendingChoice
from foregate.predictors.reuse import reuse_of
from foregate.predictors.targets import targets
from foregate.types import Prediction, PredictorCost, RoutingStep


class Fusion(PendingChoice, LearnedPredictor):
    """With u = r_l / rms(r_l), x the pre-attention input, g the router weights of the chosen experts, and p_h what the
    last token's residual gained from layer l to l+h (in units of its rms at l):

    z = silu(inward [u; x; g] + before [p_1 … p_H]) * (1 + gate g), all per layer;
    q_h = u + outward_h z + experts_h g, the guessed residual of layer l+h;
    scores_h = router_h q_h / rms(q_h) + direct_h z + repeat_h c_h, with c_h what layer l+h chose last.

    Of a choice of more than the model's top-k experts the first are taken. The file may hold advice for the eviction
    policy as well: see ``predictors.reuse``.
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
        self._dense = Products(np.concatenate([inward[:, : 2 * hidden], before], axis=1).transpose(0, 2, 1), INT4)
        self._gains = self._dense.x[2 * hidden :].reshape(hops, hidden)
        dense_bias = self.floats("inward_bias", layers, width) + self.floats("before_bias", layers, width)
        # What depends on the chosen experts alone: rows to pick and weigh, no product over all experts.
        outward = self.floats("experts_weight", layers, experts, hops * hidden)[..., : asked * hidden]
        self._picked = Rows(
            np.concatenate(
                [inward[:, 2 * hidden :], self.floats("gate_weight", layers, experts, width), outward], axis=2
            )
        )
        gate_bias = self.floats("gate_bias", layers, width) + 1
        shift = self.floats("experts_bias", layers, hops * hidden) + self.floats("outward_bias", layers, hops * hidden)
        self._picked_bias = np.concatenate([dense_bias, gate_bias, shift[:, : asked * hidden]], axis=1)
        direct = self.floats("direct_weight", layers, width, hops * experts)[..., : asked * experts]
        further = self.floats("outward_weight", layers, width, hops * hidden)[..., : asked * hidden]
        self._outward = Products(np.concatenate([further, direct], axis=2).transpose(0, 2, 1), INT4)
        direct_bias = self.floats("direct_bias", layers, hops * experts).reshape(layers, hops, experts)[:, :asked]
        router = self.floats("router", layers, hops, experts, hidden)[:, :asked]
        self._router = Products(router.reshape(layers * asked, experts, hidden))
        self._bias = np.ascontiguousarray(self.floats("router_bias", layers, hops, experts)[:, :asked] + direct_bias)
        repeat = self.floats("repeat", layers, hops, experts, experts)[:, :asked]
        self._repeat = Rows(repeat.reshape(layers * asked, experts, experts))
        self._size = width
        self._now = np.zeros((layers, hidden), np.float32)
        self._last = np.zeros((layers, hidden), np.float32)
        self._ids = np.full((layers, self.model.top_k), NOBODY, np.int64)
        self._weights = np.zeros((layers, self.model.top_k), np.float32)
        self._copies = np.zeros((2, hidden), np.float32)
        self._copied = tuple(row.ctypes.data for row in self._copies)
        self._kernel = self._compiled() if available() else None
        self.advise = reuse_of(artifact)
        """See ``interfaces.Adviser``; None where the file has none."""

    def _compiled(self) -> FusionKernel | None:
        products, rows = (self._dense, self._outward, self._router), (self._picked, self._repeat)
        if not all(part.matrices for part in products) or not all(part.given for part in rows):
            return None
        biases, state = (self._picked_bias, self._bias), (self._now, self._last, self._ids, self._weights, self._copies)
        ahead = [list(targets(self, layer, self.layers)) for layer in range(self.layers)]
        return FusionKernel(products, rows, biases, state, self.model.experts, ahead, self.hops, self.named)

    def name_at_most(self, count: int) -> None:
        super().name_at_most(count)
        self._kernel = None if self._kernel is None else self._compiled()

    def cost(self) -> PredictorCost:
        parts = [self._dense, self._outward, *[self._router] * self._asked]
        rows, top_k = [self._picked, *[self._repeat] * self._asked], self.model.top_k
        numbers = sum(part.size for part in parts) + top_k * sum(part.columns for part in rows)
        nbytes = sum(part.nbytes for part in parts) + top_k * sum(part.row_bytes for part in rows)
        return self.multiplied(numbers, nbytes)

    def reset(self) -> None:
        super().reset()
        self._now[:] = 0
        self._last[:] = 0
        self._ids[:] = NOBODY

    def _begin_token(self) -> None:
        self._last[:] = self._now

    def _keep(self, step: RoutingStep) -> None:
        layer, chosen, weights, most = step.layer, step.experts[-1], step.weights[-1], self._ids.shape[1]
        if len(chosen) == most:
            self._ids[layer], self._weights[layer] = chosen, weights
        else:
            self._ids[layer] = NOBODY
            self._ids[layer, : len(chosen)], self._weights[layer, : len(chosen)] = chosen[:most], weights[:most]

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        kernel = self._kernel
        return self._computed(signals) if kernel is None else kernel(*self._question(signals))

    def begin(self, signals: Signals) -> Callable[[], Sequence[Prediction]]:
        """See ``interfaces.Beginner``."""
        kernel = self._kernel
        return partial(self._computed, signals) if kernel is None else kernel.begin(*self._question(signals))

    def _question(self, signals: Signals) -> tuple[int, tuple[int, ...], int, tuple[int | None, int | None]]:
        """What the kernel is asked."""
        where = signals.addresses("residual", "pre_attention", numbers=self.hidden_size)
        if where is None:
            self._copies[0], self._copies[1] = self.told(signals, "residual"), self.told(signals, "pre_attention")
            where = self._copied, F32
        return signals.layer, *where, self._choice(signals, self.model.top_k)[:2]

    def _computed(self, signals: Signals) -> Sequence[Prediction]:
        """What a kernel would tell."""
        self._settle()
        self._now[signals.layer] = self.told(signals, "residual")
        return self.ranked(signals, self._scores(signals.layer, self.told(signals, "pre_attention")))

    def _scores(self, layer: int, before: Floats) -> Floats:
        """What the kernel computes, [A, E]."""
        hidden, size, seen = self.hidden_size, self._size, self._dense.x
        residual, unit = self._now[layer], seen[:hidden]
        np.multiply(residual, inverse_rms(residual), out=unit)
        seen[hidden : 2 * hidden] = before
        self._gain(layer)
        real = self._real(layer)
        rows = self._picked.of(layer, self._ids[layer, real])
        picked = self._weights[layer, real].dot(rows) + self._picked_bias[layer]
        inner = silu(self._dense.of(layer) + picked[:size]) * picked[size : 2 * size]
        out = self._outward(layer, inner)
        shifts = out[: self._asked * hidden] + picked[2 * size :]
        scores: Floats = out[self._asked * hidden :].reshape(self._asked, -1) + self._bias[layer]
        for hop in range(self._asked):
            guess = unit + shifts[hop * hidden : (hop + 1) * hidden]
            scores[hop] += self._router(layer * self._asked + hop, guess) * inverse_rms(guess)
            target = (layer + hop + 1) % self.layers
            again = self._ids[target, self._real(target)]
            scores[hop] += self._repeat.of(layer * self._asked + hop, again).sum(axis=0)
        return scores

    def _real(self, layer: int) -> NDArray[np.bool_]:
        """Which of the ids kept for ``layer`` are experts of it, [K]."""
        ids = self._ids[layer]
        real: NDArray[np.bool_] = (ids >= 0) & (ids < self.model.experts[layer])
        return real

    def _gain(self, layer: int) -> None:
        """Write what the last token's residual gained up to each hop, [H, D]; zero beyond the last layer."""
        base, known = self._last[layer], min(self.hops, self.layers - layer - 1)
        self._gains[:known] = (self._last[layer + 1 : layer + 1 + known] - base) * inverse_rms(base)
        self._gains[known:] = 0
