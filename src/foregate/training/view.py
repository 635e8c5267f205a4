"""A block of a trace as tensors, and minibatches of it: what a learner sees, and what it must predict.

Shapes: T tokens of the block, B of a minibatch, L layers, k chosen, E experts, D hidden, H hops (layers ahead).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foregate.training.dataset import Block
from foregate.training.replayed import again, policy_features


@dataclass(frozen=True)
class Targets:
    """Of the layers at each hop: what was chosen, the router's log-probabilities, what a cache lacked.

    ``chosen`` and ``absent`` (None if not asked for) [B, L, H, E] are 0 or 1; ``known`` [B, L, H] is False where the
    trace ends before. ``again`` [B, L, E] (None if not asked for) is how soon the layer at hand needs an expert again,
    NaN where too little follows to tell: see ``replayed``.
    """

    chosen: Tensor
    absent: Tensor | None
    log_probs: Tensor | None
    known: Tensor
    again: Tensor | None = None


class Tensors:
    """The tensors of one block."""

    def __init__(self, block: Block, experts: Sequence[int], score_kind: str, *, replay: bool = False) -> None:
        width = max(experts)
        self.tokens, self.layers, _ = block.experts.shape
        self.first = torch.from_numpy(block.first)
        self.token_id = torch.from_numpy(block.token_id)
        self.chosen = _multi_hot(block, width)
        self.absent = None if block.absent is None else torch.from_numpy(block.absent)
        self.gates = _gates(block, width)
        self.log_probs = _log_probs(block, score_kind)
        self.features = {name: torch.from_numpy(np.nan_to_num(values)) for name, values in block.features.items()}
        self.policy = torch.from_numpy(policy_features(block, experts)) if replay else None
        self.again = torch.from_numpy(again(block, width)) if replay else None

    def batches(self, size: int, generator: torch.Generator | None) -> Iterator[View]:
        """Views of ``size`` tokens each, in random order, or as they come."""
        order = torch.arange(self.tokens) if generator is None else torch.randperm(self.tokens, generator=generator)
        return (View(self, order[start : start + size]) for start in range(0, self.tokens, size))


@dataclass(frozen=True)
class View:
    """Tokens ``at`` [B] of a block."""

    block: Tensors
    at: Tensor

    @property
    def chosen(self) -> Tensor:
        """1 where an expert was chosen, [B, L, E]."""
        return self.block.chosen[self.at].float()

    @property
    def gates(self) -> Tensor:
        """Router weight of the chosen, 0 of others, [B, L, E]."""
        return self.block.gates[self.at].float()

    @property
    def follows(self) -> Tensor:
        """1 for a token that another one precedes in its prompt, [B, 1, 1]."""
        return (~self.block.first[self.at]).float()[:, None, None]

    def feature(self, name: str) -> Tensor:
        """Hidden states [B, L, D]."""
        return self.block.features[name][self.at]

    @property
    def policy(self) -> Tensor:
        """Features of the policy ``echo`` once it has seen the token, [B, L, E, 5]; only where a learner replays it."""
        assert self.block.policy is not None
        return self.block.policy[self.at]

    def previous(self, name: str) -> Tensor:
        """Hidden states of the token before, zero where there is none, [B, L, D]."""
        return self.block.features[name][self._before] * self.follows

    @property
    def previously_chosen(self) -> Tensor:
        """What the token before chose, [B, L, E]."""
        return self.block.chosen[self._before].float() * self.follows

    @property
    def _before(self) -> Tensor:
        return (self.at - 1).clamp(min=0)

    def targets(self, hops: Sequence[int], layers: Tensor | slice = slice(None)) -> Targets:
        """What lies ``hops`` layers after each of ``layers``; from L on it is the next token's."""
        block, after = self.block, (self.at + 1).clamp(max=self.block.tokens - 1)
        ends = (self.at + 1 >= block.tokens) | block.first[after]

        def ahead(values: Tensor) -> Tensor:
            both = torch.cat([values[self.at], values[after]], dim=1)
            return torch.stack([both[:, hop : hop + block.layers][:, layers] for hop in hops], dim=2)

        place = torch.arange(block.layers)[layers, None] + torch.tensor(list(hops))
        known = (place < block.layers)[None] | ~ends[:, None, None]
        scores = None if block.log_probs is None else ahead(block.log_probs)
        absent = None if block.absent is None else ahead(block.absent).float()
        soon = None if block.again is None else block.again[self.at]
        return Targets(ahead(block.chosen).float(), absent, scores, known, soon)


def _multi_hot(block: Block, width: int) -> Tensor:
    """[T, L, E] uint8; -1 (a layer that chooses fewer) sets nothing."""
    hot = np.zeros((*block.experts.shape[:2], width + 1), np.uint8)
    np.put_along_axis(hot, np.where(block.experts < 0, width, block.experts), 1, axis=2)
    return torch.from_numpy(np.ascontiguousarray(hot[..., :width]))


def _gates(block: Block, width: int) -> Tensor:
    gates = np.zeros((*block.experts.shape[:2], width + 1), np.float32)
    np.put_along_axis(gates, np.where(block.experts < 0, width, block.experts), block.weights, axis=2)
    return torch.from_numpy(np.ascontiguousarray(gates[..., :width]))


def _log_probs(block: Block, kind: str) -> Tensor | None:
    """Log-probabilities [T, L, E] from logits or probabilities; an expert that a layer does not have gets -1e4."""
    if block.scores is None:
        return None
    scores = block.scores if kind == "logits" else np.log(np.maximum(block.scores, 1e-7))
    return torch.log_softmax(torch.from_numpy(np.nan_to_num(scores, nan=-1e4)), dim=-1)
