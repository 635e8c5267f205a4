"""Trains the advice that ``fusion`` gives to the eviction policy: see ``predictors.reuse``.

Shapes: B tokens, L layers, E experts, D hidden, R width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from foregate.experts.echo import SCORE_BIAS, SCORE_WEIGHTS
from foregate.predictors.reuse import PREFIX
from foregate.training.dataset import Dataset
from foregate.training.learner import Learner, LearnOptions, Stack, experts_mask
from foregate.training.loop import Training
from foregate.training.trainer import Fitted, Watch
from foregate.training.view import Targets, View


@dataclass(frozen=True)
class ReuseOptions(LearnOptions):
    """``width`` is R."""

    epochs: int = 4
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    batch: int = 128
    width: int = 64


class Reuse(Learner):
    """Logistic regression on the policy's features, as the policy is, and a network beside. It begins as the policy."""

    features = ("residual",)
    replays = True
    objective = "loss"

    def __init__(self, data: Dataset, options: ReuseOptions) -> None:
        super().__init__()
        self.hops = (data.layers,)
        self.own = nn.Parameter(torch.from_numpy(SCORE_WEIGHTS).repeat(data.layers, 1))
        self.inward = Stack(data.layers, data.model.hidden_size, options.width)
        self.outward = Stack(data.layers, options.width, data.experts, zero=True)
        nn.init.constant_(self.outward.bias, SCORE_BIAS)
        self.register_buffer("mask", experts_mask(data.model.experts_per_layer, self.hops), persistent=False)

    def scores(self, view: View, layers: Tensor) -> Tensor:
        residual = view.feature("residual")
        unit = residual * residual.square().mean(-1, keepdim=True).add(1e-9).rsqrt()
        advice = self.outward(functional.silu(self.inward(unit, layers)), layers)
        return (advice + (view.policy * self.own[:, None]).sum(-1))[:, :, None] + self.mask[layers]

    def loss(self, scores: Tensor, targets: Targets) -> Tensor:
        assert targets.again is not None
        known = ~targets.again.isnan() & (self.mask[:, 0] == 0)
        losses = functional.binary_cross_entropy_with_logits(
            scores[:, :, 0], targets.again.nan_to_num(), reduction="none"
        )
        return (losses * known).sum() / known.sum().clamp(min=1)

    def known(self, targets: Targets) -> int:
        assert targets.again is not None
        return int((~targets.again.isnan()).any(-1).any(-1).sum())


def fit(data: Dataset, options: ReuseOptions, watch: Watch, before: int) -> Fitted:
    """Train on ``data``, after ``before`` steps of another training of the same file."""
    torch.manual_seed(options.seed)
    found = Training(Reuse(data, options), data, options, watch, second="reuse", before=before).run()
    tensors = {PREFIX + name: value for name, value in found.tensors.items()}
    metrics = {name: found.metrics[name] for name in ("loss", "next_token", "epochs", "best_epoch")}
    return Fitted(tensors, metrics=metrics)
