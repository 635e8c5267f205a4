"""What the eviction policy ``echo`` knows along a trace, and how soon experts are really needed again. No torch.

Shapes: T tokens, L layers, E experts of the widest layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foregate.experts.echo import FOLLOWING, PATIENCE, SCORE_WEIGHTS, Echo
from foregate.training.dataset import Block


def policy_features(block: Block, experts: Sequence[int]) -> NDArray[np.float32]:
    """``Echo.features`` after each token, [T, L, E, 5]; zero for experts that a layer does not have. The policy is new
    at the block's beginning and goes on from prompt to prompt. Needs scores."""
    assert block.scores is not None
    rule, (tokens, layers, _) = Echo(), block.experts.shape
    found = np.zeros((tokens, layers, max(experts), len(SCORE_WEIGHTS)), np.float32)
    for token in range(tokens):
        for layer, there in enumerate(experts):
            scores = block.scores[token : token + 1, layer, :there]
            rule.observe(layer, block.experts[token : token + 1, layer], scores)
            known = rule.features(layer)
            found[token, layer, : known.shape[1]] = known.T
    return found


def again(block: Block, width: int) -> NDArray[np.float32]:
    """exp(-(tokens to the next use in this prompt - 1) / PATIENCE), [T, L, E]; NaN for tokens that fewer than
    ``FOLLOWING`` follow."""
    tokens, layers, _ = block.experts.shape
    soon = np.zeros((tokens, layers, width), np.float32)
    ahead = np.full((layers, width + 1), np.inf, np.float32)
    following = 0
    for token in range(tokens - 1, -1, -1):
        soon[token] = np.exp((1 - ahead[:, :width]) / PATIENCE) if following >= FOLLOWING else np.nan
        ahead += 1
        np.put_along_axis(ahead, np.where(block.experts[token] < 0, width, block.experts[token]), 1.0, axis=1)
        following += 1
        if block.first[token]:
            ahead[:], following = np.inf, 0
    return soon
