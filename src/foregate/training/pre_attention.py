"""Trains ``pre-attention``: the experts of a layer from the input of its own attention; one predictor a layer.

After "pre-attention expert prediction": architectures 1 (batch norm, GELU, dropout) and 2 (SiLU), four losses.
Shapes: B tokens, L layers, l of them in a step, E experts, k chosen, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from foregate.training.dataset import Dataset
from foregate.training.learner import Learner, LearnOptions, Stack, array, experts_mask, mean_known
from foregate.training.loop import Training
from foregate.training.trainer import Fitted, Trainer, Watch
from foregate.training.view import Targets, View

MSE, WEIGHTED, FOCAL, RANKING = "mse", "weighted-bce", "focal", "ranking-bce"
WIDER = 10 / 6
"""The paper weighs the ten highest ranks where six are chosen; other models get the same proportion,"""
NEXT = 30 / 6
"""and ranks 11 to 30 likewise."""
HIGH, MIDDLE, LOW = 3.0, 1.5, 0.5
PAIR_WEIGHT, MARGIN = 0.3, 0.1
FOCUS = 2.0


@dataclass(frozen=True)
class PreAttentionOptions(LearnOptions):
    """``previous``: read the input of the token before as well (ours, not the paper's).

    The paper's best loss is ``weighted-bce``; here ``mse`` on the router's logits is ahead of it (docs/studies.md).
    """

    lookahead: int = field(default=0, metadata={"choices": (0,)})
    epochs: int = 8
    patience: int = 8
    arch: int = field(default=2, metadata={"choices": (1, 2)})
    loss: str = field(default=MSE, metadata={"choices": (MSE, WEIGHTED, FOCAL, RANKING)})
    hidden: int = 2048
    previous: bool = False
    dropout: float = 0.1


class PreAttention(Learner):
    """``first`` and ``second`` linear maps of every layer, with what the architecture has between them."""

    features = ("pre_attention",)
    hops = (0,)

    def __init__(self, data: Dataset, options: PreAttentionOptions) -> None:
        super().__init__()
        self._options = options
        inputs = data.model.hidden_size * (2 if options.previous else 1)
        self.first = Stack(data.layers, inputs, options.hidden)
        self.norm = nn.BatchNorm1d(data.layers * options.hidden) if options.arch == 1 else None
        self.second = Stack(data.layers, options.hidden, data.experts)
        self.register_buffer("mask", experts_mask(data.model.experts_per_layer, self.hops), persistent=False)
        self._chosen = data.model.width

    def scores(self, view: View, layers: Tensor) -> Tensor:
        x = view.feature("pre_attention")
        if self._options.previous:
            x = torch.cat([x, view.previous("pre_attention")], dim=-1)
        hidden = self.first(x, layers)
        if self.norm is None:
            hidden = functional.silu(hidden)
        else:
            hidden = functional.gelu(self._normed(self.norm, hidden.flatten(1)).view_as(hidden), approximate="tanh")
            hidden = functional.dropout(hidden, self._options.dropout, self.training)
        return self.second(hidden, layers)[:, :, None] + self.mask

    @staticmethod
    def _normed(norm: nn.BatchNorm1d, hidden: Tensor) -> Tensor:
        """A batch of one token has no spread: it is normed as in serving."""
        if len(hidden) > 1:
            normed: Tensor = norm(hidden)
            return normed
        return functional.batch_norm(hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

    def loss(self, scores: Tensor, targets: Targets) -> Tensor:
        kind = self._options.loss
        if kind == FOCAL:
            return mean_known(_focal(scores, targets.chosen).mean(-1), targets)
        assert targets.log_probs is not None
        if kind == MSE:
            centred = targets.log_probs.clamp(min=-20)
            exists = targets.log_probs > -1e3
            centred = centred - _mean(centred, exists)
            return mean_known(_mean((scores - centred).square(), exists)[..., 0], targets)
        order = targets.log_probs.argsort(dim=-1, descending=True, stable=True)
        rank = order.argsort(dim=-1)
        high = round(WIDER * self._chosen)
        middle = round(NEXT * self._chosen) if kind == RANKING else high
        weight = torch.where(rank < high, HIGH, torch.where(rank < middle, MIDDLE, LOW))
        losses = functional.binary_cross_entropy_with_logits(scores, targets.chosen, weight, reduction="none").mean(-1)
        if kind == RANKING:
            losses = losses + PAIR_WEIGHT * _pairs(scores.gather(-1, order[..., :high]))
        return mean_known(losses, targets)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The batch norm is folded into the first map."""
        first, bias = array(self.first.weight), array(self.first.bias)
        if self.norm is not None:
            assert self.norm.running_var is not None
            assert self.norm.running_mean is not None
            scale = array(self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()).reshape(bias.shape)
            shift = array(self.norm.bias).reshape(bias.shape)
            bias = (bias - array(self.norm.running_mean).reshape(bias.shape)) * scale + shift
            first = first * scale[:, None]
        return {
            "first": np.ascontiguousarray(first),
            "first_bias": np.ascontiguousarray(bias),
            "second": array(self.second.weight),
            "second_bias": array(self.second.bias),
        }

    def settings(self) -> Mapping[str, Any]:
        return {"activation": "silu" if self.norm is None else "gelu"}


def _mean(values: Tensor, exists: Tensor) -> Tensor:
    return (values * exists).sum(-1, keepdim=True) / exists.sum(-1, keepdim=True).clamp(min=1)


def _focal(scores: Tensor, chosen: Tensor) -> Tensor:
    """Binary focal loss, focus 2."""
    plain = functional.binary_cross_entropy_with_logits(scores, chosen, reduction="none")
    right = torch.where(chosen > 0, torch.sigmoid(scores), torch.sigmoid(-scores))
    return (1 - right) ** FOCUS * plain


def _pairs(ranked: Tensor) -> Tensor:
    """``ranked`` [..., m] are predicted scores in the order of the true ones: what is too small a margin, summed."""
    gaps = MARGIN - (ranked[..., :, None] - ranked[..., None, :])
    later = torch.ones(ranked.shape[-1], ranked.shape[-1]).triu(1)
    return (functional.relu(gaps) * later).sum((-1, -2))


def fit(data: Dataset, options: PreAttentionOptions, watch: Watch) -> Fitted:
    """Train on ``data``."""
    torch.manual_seed(options.seed)
    return Training(PreAttention(data, options), data, options, watch).run()


TRAINER = Trainer(fit, PreAttentionOptions, ("pre_attention",), scores=True)
