"""Next-token choice: greedy, or temperature and top-p with a seed. The warpers are transformers' own."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from foregate.config import SamplingConfig
from foregate.native.head import best


class Sampler:
    """Chooses token ids from logits [V]; the same seed gives the same choices."""

    def __init__(self, config: SamplingConfig) -> None:
        self._greedy = config.temperature == 0
        self._warpers: list[LogitsProcessor] = []
        if not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(config.temperature))
        if not self._greedy and config.top_p < 1:
            self._warpers.append(TopPLogitsWarper(config.top_p))
        self._generator = torch.Generator().manual_seed(config.seed)

    def choose(self, logits: Tensor) -> int:
        """Token id for ``logits`` [V]."""
        if self._greedy:
            return best(logits)
        scores = logits.float()[None]
        for warp in self._warpers:
            scores = warp(None, scores)
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))
