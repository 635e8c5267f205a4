"""Trains ``fusion``: a correction of the residual stream, learned per layer, before a copy of the later router.

Shapes: B tokens, L layers, l of them in a step, H hops, E experts, D hidden, R width of the correction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from foregate.training import reuse
from foregate.training.dataset import Dataset
from foregate.training.judge import CACHE_SHARE
from foregate.training.learner import Learner, LearnOptions, Stack, experts_mask, hops_ahead, mean_known
from foregate.training.loop import Training
from foregate.training.routers import recover
from foregate.training.trainer import Fitted, Trainer, Watch
from foregate.training.view import Targets, View


@dataclass(frozen=True)
class FusionOptions(LearnOptions):
    """``width`` is R; ``misses`` weighs the loss over absent experts against that over all. ``reuse_epochs``: of advice
    for the eviction policy (``training.reuse``, which has its own width, batch, learning rate and decay); 0: none."""

    lookahead: int = 1
    epochs: int = 8
    learning_rate: float = 2e-3
    width: int = 64
    misses: float = 1.0
    reuse_epochs: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("reuse_epochs", 0)


class Fusion(Learner):
    """See ``predictors.fusion`` for the formula; the arrays have its names."""

    features = ("residual", "pre_attention")
    cache_share = CACHE_SHARE
    objective = "recall_on_misses"

    def __init__(self, data: Dataset, options: FusionOptions) -> None:
        super().__init__()
        self.hops = hops_ahead(options.lookahead)
        self._misses = options.misses
        layers, experts, width = data.layers, data.experts, data.model.hidden_size
        hops, self._experts = len(self.hops), experts
        routers = recover(data)
        self.register_buffer("mask", experts_mask(data.model.experts_per_layer, self.hops), persistent=False)
        self.inward = Stack(layers, 2 * width + experts, options.width)
        self.before = Stack(layers, width * hops, options.width)
        self.gate = Stack(layers, experts, options.width, zero=True)
        self.outward = Stack(layers, options.width, hops * width, zero=True)
        self.experts = Stack(layers, experts, hops * width, zero=True)
        self.direct = Stack(layers, options.width, hops * experts, zero=True)
        self.repeat = nn.Parameter(torch.zeros(layers, hops, experts, experts))
        effective = torch.from_numpy(routers.weight * routers.norm[:, None])
        bias = torch.from_numpy(routers.bias)
        self.router = nn.Parameter(torch.stack([_later(effective, hop) for hop in self.hops], dim=1))
        self.router_bias = nn.Parameter(torch.stack([_later(bias, hop) for hop in self.hops], dim=1))

    def scores(self, view: View, layers: Tensor) -> Tensor:
        residual, chosen = view.feature("residual"), view.gates
        unit = _unit(residual)
        known = torch.cat([unit, view.feature("pre_attention"), chosen], dim=-1)
        grown = self._growth(view)
        inner = functional.silu(self.inward(known, layers) + self.before(grown, layers))
        inner = inner * (1 + self.gate(chosen, layers))
        tokens, many = unit.shape[:2]
        shift = (self.outward(inner, layers) + self.experts(chosen, layers)).view(tokens, many, len(self.hops), -1)
        state = _unit(unit[:, :, None] + shift)
        scores = torch.einsum("blhd,lhed->blhe", state, self.router) + self.router_bias
        scores = scores + self.direct(inner, layers).view_as(scores)
        return scores + self._repeated(view) + self.mask

    def _growth(self, view: View) -> Tensor:
        """What the token before added to its residual from this layer to each hop's, in units of it, [B, L, H D]."""
        before = view.previous("residual")
        scale = before.square().mean(-1, keepdim=True).add(1e-9).rsqrt()
        return torch.cat(
            [(_later_tokens(before, hop) - before) * scale * _inside(before, hop) for hop in self.hops], -1
        )

    def _repeated(self, view: View) -> Tensor:
        """Scores from what the token before chose in each target layer (of this token's own, beyond the last)."""
        earlier, now = view.previously_chosen, view.chosen
        both = torch.cat([earlier, now], dim=1)
        layers = earlier.shape[1]
        history = torch.stack([both[:, hop : hop + layers] for hop in self.hops], dim=2)
        return torch.einsum("blhf,lhfe->blhe", history, self.repeat)

    def loss(self, scores: Tensor, targets: Targets) -> Tensor:
        assert targets.log_probs is not None
        assert targets.absent is not None
        divergence = functional.kl_div(
            torch.log_softmax(scores, -1), targets.log_probs, log_target=True, reduction="none"
        ).sum(-1)
        loss = mean_known(divergence, targets)
        if self._misses:
            missed = targets.chosen * targets.absent
            count = missed.sum(-1)
            among = torch.log_softmax(scores.masked_fill(targets.absent == 0, -1e4), -1)
            lists = -(missed * among).sum(-1) * targets.known
            loss = loss + self._misses * lists.sum() / (count * targets.known).sum().clamp(min=1)
        return loss

    def settings(self) -> Mapping[str, Any]:
        return {}


def _unit(x: Tensor) -> Tensor:
    return x * x.square().mean(-1, keepdim=True).add(1e-9).rsqrt()


def _later(values: Tensor, hop: int) -> Tensor:
    """Of the layer ``hop`` after each; zero beyond the last, [L, ...]."""
    shifted = torch.zeros_like(values)
    shifted[: len(values) - hop] = values[hop:]
    return shifted


def _later_tokens(values: Tensor, hop: int) -> Tensor:
    return torch.cat([values[:, hop:], torch.zeros_like(values[:, :hop])], dim=1)


def _inside(values: Tensor, hop: int) -> Tensor:
    """1 where the layer ``hop`` ahead is of the same token, [L, 1]."""
    return (torch.arange(values.shape[1]) + hop < values.shape[1]).float()[:, None]


def fit(data: Dataset, options: FusionOptions, watch: Watch) -> Fitted:
    """Train on ``data``."""
    torch.manual_seed(options.seed)
    training = Training(Fusion(data, options), data, options, watch)
    found = training.run()
    if not options.reuse_epochs:
        return found
    further = reuse.ReuseOptions(
        seed=options.seed,
        patience=options.patience,
        precision=options.precision,
        block=options.block,
        epochs=options.reuse_epochs,
    )
    more = reuse.fit(data, further, watch, training.steps)
    return replace(found, tensors={**found.tensors, **more.tensors}, metrics={**found.metrics, "reuse": more.metrics})


TRAINER = Trainer(fit, FusionOptions, ("residual", "pre_attention", "router_input"), scores=True)
