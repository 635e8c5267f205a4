"""Trains ``estimator`` and ``hybrid``: a small network on the next-gate signal, towards the later router's scores.

After "speculating experts". The hybrid keeps the plain signal where that is as good on half of the validation prompts.
Shapes: B tokens, L layers, E experts, H hops, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from foregate.training.dataset import CHOICE, REPORT, Dataset
from foregate.training.history import HistoryOptions
from foregate.training.learner import Learner, array, experts_mask, hops_ahead, mean_known
from foregate.training.loop import Training, judge
from foregate.training.routers import Routers, recover
from foregate.training.trainer import Fitted, Trainer, Watch
from foregate.training.view import Targets, View


@dataclass(frozen=True)
class EstimatorOptions(HistoryOptions):
    """``hidden``: width of the network; ``embedding``: numbers that tell it the layer."""

    lookahead: int = 1
    epochs: int = 6
    hidden: int = 512
    embedding: int = 32


class Estimator(Learner):
    """Unit residual and a layer embedding, through one hidden layer shared by all layers."""

    features = ("residual",)
    norm: Tensor

    def __init__(self, data: Dataset, options: EstimatorOptions, routers: Routers) -> None:
        super().__init__()
        self.hops = hops_ahead(options.lookahead)
        self.register_buffer("mask", experts_mask(data.model.experts_per_layer, self.hops), persistent=False)
        self._wide = (len(self.hops), data.experts)
        later = np.stack([_later(routers.norm, hop) for hop in self.hops], axis=1)
        self.register_buffer("norm", torch.from_numpy(later), persistent=False)
        width = data.model.hidden_size
        self.layer = nn.Parameter(0.1 * torch.randn(data.layers, options.embedding))
        self.first = nn.Linear(width * len(self.hops) + options.embedding, options.hidden)
        self.second = nn.Linear(options.hidden, len(self.hops) * data.experts)

    def scores(self, view: View, layers: Tensor) -> Tensor:
        unit = unit_rms(view.feature("residual")[:, layers])
        signal = (unit[:, :, None] * self.norm[layers]).flatten(2)
        known = torch.cat([signal, self.layer[layers].expand(len(unit), -1, -1)], dim=-1)
        scores: Tensor = self.second(functional.silu(self.first(known)))
        return scores.view(*scores.shape[:2], *self._wide) + self.mask[layers]

    def loss(self, scores: Tensor, targets: Targets) -> Tensor:
        return mean_known(divergence(scores, targets), targets)

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {**super().arrays(), "norm": array(self.norm)}


class Plain(Learner):
    """The next-gate signal through recovered routers: what the hybrid keeps where it is good enough."""

    features = ("residual",)

    def __init__(self, data: Dataset, hops: tuple[int, ...], routers: Routers) -> None:
        super().__init__()
        self.hops = hops
        self.register_buffer("mask", experts_mask(data.model.experts_per_layer, hops), persistent=False)
        effective = routers.weight * routers.norm[:, None]
        self.router = torch.from_numpy(np.stack([_later(effective, hop) for hop in hops], axis=1))
        self.bias = torch.from_numpy(np.stack([_later(routers.bias, hop) for hop in hops], axis=1))

    def scores(self, view: View, layers: Tensor) -> Tensor:
        unit = unit_rms(view.feature("residual")[:, layers])
        return torch.einsum("bld,lhed->blhe", unit, self.router[layers]) + self.bias[layers] + self.mask[layers]

    def loss(self, scores: Tensor, targets: Targets) -> Tensor:
        return mean_known(divergence(scores, targets), targets)


def divergence(scores: Tensor, targets: Targets) -> Tensor:
    """KL from the true router's distribution to that of ``scores``, [B, L, H]."""
    assert targets.log_probs is not None
    return functional.kl_div(torch.log_softmax(scores, -1), targets.log_probs, log_target=True, reduction="none").sum(
        -1
    )


def unit_rms(x: Tensor) -> Tensor:
    """``x`` divided by its root mean square over the last axis."""
    return x * x.square().mean(-1, keepdim=True).add(1e-9).rsqrt()


def _later(values: NDArray[np.float32], hop: int) -> NDArray[np.float32]:
    """Of the layer ``hop`` after each, [L, ...]; zero beyond the last."""
    shifted = np.zeros_like(values)
    shifted[: len(values) - hop] = values[hop:]
    return shifted


def fit_estimator(data: Dataset, options: EstimatorOptions, watch: Watch) -> Fitted:
    """Train on ``data``."""
    torch.manual_seed(options.seed)
    return Training(Estimator(data, options, recover(data)), data, options, watch).run()


@dataclass(frozen=True)
class HybridOptions(EstimatorOptions):
    """``margin``: the estimator is used where its recall@k on validation prompts is higher by more than this."""

    margin: float = field(default=0.0)


class Mixed(Learner):
    """The hybrid: of every layer and hop, the estimator's scores where ``chosen`` [L, H], else the plain signal's."""

    features = ("residual",)

    def __init__(self, estimator: Estimator, plain: Plain, chosen: NDArray[np.bool_]) -> None:
        super().__init__()
        self.hops = estimator.hops
        self._estimator, self._plain, self._chosen = estimator, plain, torch.from_numpy(chosen)

    def scores(self, view: View, layers: Tensor) -> Tensor:
        chosen = self._chosen[layers][..., None]
        return torch.where(chosen, self._estimator.scores(view, layers), self._plain.scores(view, layers))

    def loss(self, scores: Tensor, targets: Targets) -> Tensor:
        return mean_known(divergence(scores, targets), targets)


def fit_hybrid(data: Dataset, options: HybridOptions, watch: Watch) -> Fitted:
    """Train the estimator, then choose between it and the plain signal, layer by layer, by half of the validation
    prompts; metrics are of the other half, and there are none where validation is one prompt."""
    torch.manual_seed(options.seed)
    routers = recover(data)
    learner = Estimator(data, options, routers)
    fitted = Training(learner, data, options, watch).run()
    plain = Plain(data, hops_ahead(options.lookahead), routers)
    chosen = _choose(learner, plain, data, options)
    tensors = {**fitted.tensors, "estimated": np.ascontiguousarray(chosen.astype(np.uint8))}
    tensors |= {"router": array(plain.router), "router_bias": array(plain.bias)}
    judged = judge(Mixed(learner, plain, chosen), data, REPORT, options) if data.count(REPORT) else {}
    metrics = {**judged, "estimator": dict(fitted.metrics)}
    halves = {"chosen_by_prompts": data.count(CHOICE), "judged_on_prompts": data.count(REPORT)}
    return Fitted(tensors, fitted.settings, {**metrics, **halves})


def _choose(learner: Estimator, plain: Plain, data: Dataset, options: HybridOptions) -> NDArray[np.bool_]:
    """Whether the estimator is the better one, [L, H]."""
    ours = judge(learner, data, CHOICE, options)["recall_by_layer"]
    theirs = judge(plain, data, CHOICE, options)["recall_by_layer"]
    found = [[_better(a, b, options.margin) for a, b in zip(ours[hop], theirs[hop], strict=True)] for hop in ours]
    return np.asarray(found).T.copy()


def _better(ours: float | None, other: float | None, margin: float) -> bool:
    return (ours or 0.0) > (other or 0.0) + margin


ESTIMATOR = Trainer(fit_estimator, EstimatorOptions, ("residual", "router_input"), scores=True)
HYBRID = Trainer(fit_hybrid, HybridOptions, ("residual", "router_input"), scores=True)
