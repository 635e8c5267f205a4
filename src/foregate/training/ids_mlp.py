"""Trains ``ids-mlp`` (DuoServe): later layers from this token's chosen ids, popularity and affinity.

Shapes: B tokens, L layers, E experts, H hops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from foregate.training.counting import MarkovOptions, fit_markov, fit_popularity
from foregate.training.dataset import Dataset
from foregate.training.history import HistoryOptions
from foregate.training.learner import Learner, experts_mask, hops_ahead
from foregate.training.loop import Training
from foregate.training.trainer import Fitted, Options, Trainer, Watch
from foregate.training.view import View


@dataclass(frozen=True)
class IdsOptions(HistoryOptions):
    """``hidden``: width of the two hidden layers."""

    lookahead: int = 1
    hidden: int = 256


class IdsMlp(Learner):
    """Chosen ids of this layer, popularity of and affinity to the later layer, and which layer; one net for all."""

    popularity: Tensor
    affinity: Tensor

    def __init__(self, data: Dataset, options: IdsOptions, popularity: NDArray[Any], affinity: NDArray[Any]) -> None:
        super().__init__()
        self.hops = hops_ahead(options.lookahead)
        hops = len(self.hops)
        self.register_buffer("mask", experts_mask(data.model.experts_per_layer, self.hops), persistent=False)
        rolled = np.stack([np.roll(popularity, -hop, axis=0) for hop in self.hops], axis=1)
        self.register_buffer("popularity", torch.from_numpy(rolled.reshape(data.layers, -1)), persistent=False)
        self.register_buffer("affinity", torch.from_numpy(affinity), persistent=False)
        self._arrays = {"popularity": popularity, "affinity": affinity}
        self._wide = (hops, data.experts)
        self.first = nn.Linear(data.experts * (1 + 2 * hops) + data.layers, options.hidden)
        self.second = nn.Linear(options.hidden, options.hidden)
        self.third = nn.Linear(options.hidden, hops * data.experts)

    def scores(self, view: View, layers: Tensor) -> Tensor:
        chosen = view.chosen[:, layers]
        affinity = torch.einsum("ble,hlef->blhf", chosen, self.affinity[:, layers])
        affinity = affinity / chosen.sum(-1).clamp(min=1)[..., None, None]
        fixed = torch.cat([self.popularity[layers], functional.one_hot(layers, view.block.layers).float()], dim=-1)
        known = torch.cat([chosen, affinity.flatten(2), fixed.expand(len(chosen), -1, -1)], dim=-1)
        hidden = functional.relu(self.second(functional.relu(self.first(known))))
        scores: Tensor = self.third(hidden)
        return scores.view(*scores.shape[:2], *self._wide) + self.mask[layers]

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {**super().arrays(), **self._arrays}

    def settings(self) -> Mapping[str, Any]:
        return {}


def fit(data: Dataset, options: IdsOptions, watch: Watch) -> Fitted:
    """Count popularity and affinity, then train."""
    torch.manual_seed(options.seed)
    popularity = fit_popularity(data, Options(), watch).tensors["popularity"]
    affinity = fit_markov(data, MarkovOptions(lookahead=options.lookahead), watch).tensors["transition"]
    return Training(IdsMlp(data, options, popularity, affinity), data, options, watch).run()


TRAINER = Trainer(fit, IdsOptions)
