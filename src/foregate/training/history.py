"""Trains ``history-transformer``, ``history-mlp`` and ``history-lstm``: later layers from this token's routing so far.

After "pipelined inference with a lightweight gating network". Published per layer; here one model serves all layers,
so each is told the layer: by absolute positions, a one-hot input, or by counting from layer 0.
Shapes: B tokens, L layers, l of them in a step, W window, E experts, d width, H hops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from foregate.training.dataset import Dataset
from foregate.training.learner import Learner, LearnOptions, array, experts_mask, hops_ahead
from foregate.training.loop import Training
from foregate.training.trainer import Fitted, Trainer, Watch
from foregate.training.view import View

FEED_FORWARD = 4
"""Width of the feed-forward part, in d."""
BLOCKS = 2


@dataclass(frozen=True)
class HistoryOptions(LearnOptions):
    """Layers 1 … lookahead ahead are predicted; the paper's own is 2, so that a whole layer covers the transfer."""

    lookahead: int = 2
    epochs: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("lookahead", 1)


@dataclass(frozen=True)
class WindowOptions(HistoryOptions):
    """``window``: how many layers are seen. ``layers_per_step``: of how many layers of each token a step learns."""

    window: int = 10
    layers_per_step: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("window", 1)
        self.at_least("layers_per_step", 1)


@dataclass(frozen=True)
class TransformerOptions(WindowOptions):
    """``width`` is d."""

    epochs: int = 4
    width: int = 128
    heads: int = 4
    dropout: float = 0.1


@dataclass(frozen=True)
class MlpOptions(WindowOptions):
    """``hidden``: width of the two hidden layers."""

    layers_per_step: int = 16
    hidden: int = 256


@dataclass(frozen=True)
class LstmOptions(HistoryOptions):
    """``hidden``: width of the two recurrent layers. Its window is the whole token."""

    hidden: int = 256


class _History(Learner):
    def __init__(self, data: Dataset, options: HistoryOptions) -> None:
        super().__init__()
        self.hops = hops_ahead(options.lookahead)
        self._layers_per_step = getattr(options, "layers_per_step", data.layers)
        self.register_buffer("mask", experts_mask(data.model.experts_per_layer, self.hops), persistent=False)
        self._wide = (len(self.hops), data.experts)

    def choose_layers(self, layers: int, generator: torch.Generator) -> Tensor:
        if self._layers_per_step >= layers:
            return torch.arange(layers)
        return torch.randperm(layers, generator=generator)[: self._layers_per_step].sort().values

    def shaped(self, scores: Tensor, layers: Tensor) -> Tensor:
        """[B, l, H E] → [B, l, H, E], without the experts that a layer does not have."""
        return scores.view(*scores.shape[:2], *self._wide) + self.mask[layers]


def windows(values: Tensor, layers: Tensor, window: int) -> Tensor:
    """The last ``window`` layers up to each of ``layers``: [B, L, X] → [B, l, W, X]; zeros before layer 0."""
    padded = functional.pad(values, (0, 0, window - 1, 0))
    return padded[:, layers[:, None] + torch.arange(window)]


class HistoryMlp(_History):
    """The flattened window and the layer, through two hidden layers."""

    def __init__(self, data: Dataset, options: MlpOptions) -> None:
        super().__init__(data, options)
        self._window = options.window
        inputs = options.window * data.experts + data.layers
        self.first = nn.Linear(inputs, options.hidden)
        self.second = nn.Linear(options.hidden, options.hidden)
        self.third = nn.Linear(options.hidden, len(self.hops) * data.experts)

    def scores(self, view: View, layers: Tensor) -> Tensor:
        seen = windows(view.chosen, layers, self._window).flatten(2)
        place = functional.one_hot(layers, view.block.layers).float().expand(len(seen), -1, -1)
        hidden = functional.relu(self.first(torch.cat([seen, place], dim=-1)))
        return self.shaped(self.third(functional.relu(self.second(hidden))), layers)


class HistoryLstm(_History):
    """Two recurrent layers that step from layer to layer of a token."""

    def __init__(self, data: Dataset, options: LstmOptions) -> None:
        super().__init__(data, options)
        self.lstm = nn.LSTM(data.experts, options.hidden, BLOCKS, batch_first=True)
        self.head = nn.Linear(options.hidden, len(self.hops) * data.experts)

    def scores(self, view: View, layers: Tensor) -> Tensor:
        states, _ = self.lstm(view.chosen)
        return self.shaped(self.head(states[:, layers]), layers)


class _Block(nn.Module):
    """One encoder block: attention, feed-forward, each added and normed afterwards."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self._heads, self._dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.up = nn.Linear(width, FEED_FORWARD * width)
        self.down = nn.Linear(FEED_FORWARD * width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, valid: Tensor, queries: slice) -> Tensor:
        """``x`` [N, W, d]; ``valid`` [N, W] says which positions exist; the result is of positions ``queries``."""
        count, window, width = x.shape
        q, k, v = self.qkv(x).view(count, window, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        drop = self._dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q[:, :, queries], k, v, valid[:, None, None], dropout_p=drop)
        added = self._drop(self.out(mixed.transpose(1, 2).reshape(count, -1, width)))
        x = self.norm1(x[:, queries] + added)
        normed: Tensor = self.norm2(x + self._drop(self.down(self._drop(functional.relu(self.up(x))))))
        return normed

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self._dropout, self.training)


class HistoryTransformer(_History):
    """An encoder over the window; the last position's state gives the scores."""

    def __init__(self, data: Dataset, options: TransformerOptions) -> None:
        super().__init__(data, options)
        self._window, self._heads = options.window, options.heads
        self.embed = nn.Linear(data.experts, options.width)
        self.positions = nn.Parameter(0.02 * torch.randn(data.layers, options.width))
        self.blocks = nn.ModuleList(_Block(options.width, options.heads, options.dropout) for _ in range(BLOCKS))
        self.head = nn.Linear(options.width, len(self.hops) * data.experts)

    def scores(self, view: View, layers: Tensor) -> Tensor:
        x = windows(self.embed(view.chosen) + self.positions, layers, self._window)
        tokens, many = x.shape[:2]
        valid = layers[:, None] + torch.arange(self._window) >= self._window - 1
        valid = valid.expand(tokens, -1, -1).flatten(0, 1)
        x = self.blocks[0](x.flatten(0, 1), valid, slice(None))
        last = self.blocks[1](x, valid, slice(-1, None))[:, 0]
        return self.shaped(self.head(last).view(tokens, many, -1), layers)

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {name.replace(".", "_"): array(value) for name, value in self.named_parameters()}

    def settings(self) -> Mapping[str, Any]:
        return {"window": self._window, "heads": self._heads}


def _trainer(kind: type[_History], options: type[HistoryOptions]) -> Trainer:
    def fit(data: Dataset, chosen: Any, watch: Watch) -> Fitted:
        torch.manual_seed(chosen.seed)
        return Training(kind(data, chosen), data, chosen, watch).run()

    return Trainer(fit, options)


TRANSFORMER = _trainer(HistoryTransformer, TransformerOptions)
MLP = _trainer(HistoryMlp, MlpOptions)
LSTM = _trainer(HistoryLstm, LstmOptions)
