"""Trains ``sequence``: a recurrent model over tokens, fed with the whole routing of each; ours.

Between tokens a gated recurrent unit steps once, on what all layers chose. Within a token, what each layer chose is
added to a running sum, and both together score all later layers, and those of the next token.
Shapes: T tokens, L layers, l of them in a step, E experts, H hops, d width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from foregate.training.dataset import Dataset
from foregate.training.history import HistoryOptions
from foregate.training.learner import Learner, experts_mask, hops_ahead
from foregate.training.loop import Training
from foregate.training.trainer import Fitted, Trainer, Watch
from foregate.training.view import View


@dataclass(frozen=True)
class SequenceOptions(HistoryOptions):
    """``width`` is d. A block is one step here: its prompts run side by side."""

    lookahead: int = 4
    epochs: int = 12
    patience: int = 3
    learning_rate: float = 4e-3
    block: int = 1024
    width: int = 256


class Sequence(Learner):
    """``embed`` [L, E, d] what a choice adds; ``head`` [L, E, d] scores layer's experts from the state."""

    in_order = True

    def __init__(self, data: Dataset, options: SequenceOptions) -> None:
        super().__init__()
        layers, experts, width = data.layers, data.experts, options.width
        self.hops = hops_ahead(min(options.lookahead, layers))
        self.register_buffer("mask", experts_mask(data.model.experts_per_layer, self.hops), persistent=False)
        self.embed = nn.Parameter(torch.randn(layers, experts, width) * 0.05)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.ahead = nn.Linear(width, width)
        self.within = nn.Linear(width, width)
        self.layer = nn.Parameter(torch.zeros(layers, width))
        self.head = nn.Parameter(torch.randn(layers, experts, width) * width**-0.5)
        self.head_bias = nn.Parameter(torch.zeros(layers, experts))
        self.next_head = nn.Parameter(torch.randn(layers, experts, width) * width**-0.5)
        self.next_bias = nn.Parameter(torch.zeros(layers, experts))

    def scores(self, view: View, layers: Tensor) -> Tensor:
        added = torch.einsum("tle,led->tld", view.chosen, self.embed)
        before = self._states(functional.silu(added.sum(1)), view.block.first)
        running = added.cumsum(1)
        inner = functional.silu(self.ahead(before)[:, None] + self.within(running) + self.layer)
        count = len(self.layer)
        later = torch.einsum("tld,med->tlme", inner, self.head) + self.head_bias
        after = torch.einsum("tld,med->tlme", inner, self.next_head) + self.next_bias
        both = torch.cat([later, after], dim=2)
        place = torch.arange(count)[:, None] + torch.tensor(self.hops)
        picked = both[:, torch.arange(count)[:, None], place]
        return (picked + self.mask)[:, layers]

    def _states(self, inputs: Tensor, first: Tensor) -> Tensor:
        """State before each token [T, d]: zero at the first of a prompt."""
        starts = torch.nonzero(first)[:, 0]
        lengths = torch.diff(starts, append=torch.tensor([len(inputs)]))
        number = torch.repeat_interleave(torch.arange(len(starts)), lengths)
        within = torch.arange(len(inputs)) - starts[number]
        padded = inputs.new_zeros(len(starts), int(lengths.max()) + 1, inputs.shape[1])
        padded = padded.index_put((number, within + 1), inputs)
        # the first input is zero, and so is the state before it; row i holds the state after input i - 1
        states, _ = self.gru(padded[:, 1:])
        shifted = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
        return shifted[number, within]

    def settings(self) -> Mapping[str, Any]:
        return {}


def fit(data: Dataset, options: SequenceOptions, watch: Watch) -> Fitted:
    """Train on ``data``."""
    torch.manual_seed(options.seed)
    return Training(Sequence(data, options), data, options, watch).run()


TRAINER = Trainer(fit, SequenceOptions)
