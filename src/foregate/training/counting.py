"""Fits what needs only counts of the routing: ``popularity`` and ``markov``. No torch.

Shapes: T tokens, L MoE layers, E experts of the widest layer, k experts chosen, H hops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.training.dataset import TRAIN, Dataset
from foregate.training.trainer import Fitted, Options, Trainer, Watch


@dataclass(frozen=True)
class MarkovOptions(Options):
    """``hops``: tables for 1 … hops layers ahead (0: as many as the lookahead). ``smoothing``: how many tokens the
    overall shares of the later layer count for, in each row."""

    hops: int = 0
    smoothing: float = 1.0


def fit_popularity(data: Dataset, options: Options, watch: Watch) -> Fitted:
    """Share of the training tokens that each expert of each layer was chosen by, [L, E]."""
    data.require(TRAIN)
    watch.begin("count", data.count(TRAIN))
    counts = np.zeros((data.layers, data.experts))
    for prompt in data.prompts(TRAIN):
        counts += multi_hot(prompt.experts, data.experts).sum(axis=0, dtype=np.float64)
        watch.advance()
    tokens = data.tokens(TRAIN)
    return Fitted({"popularity": (counts / tokens).astype(np.float32)}, {}, {"tokens": tokens})


def fit_markov(data: Dataset, options: MarkovOptions, watch: Watch) -> Fitted:
    """P(expert f of layer l+h | expert e of layer l), [H, L, E, E]; from L on the layer is the next token's."""
    data.require(TRAIN)
    hops = options.hops or options.lookahead
    watch.begin("count", data.count(TRAIN))
    pairs = np.zeros((hops, data.layers, data.experts, data.experts))
    rows = np.zeros((hops, data.layers, data.experts))
    for prompt in data.prompts(TRAIN):
        hot = multi_hot(prompt.experts, data.experts)
        for hop in range(1, hops + 1):
            source, target = hop_pairs(hot, hop)
            pairs[hop - 1] += np.einsum("tle,tlf->lef", source, target)
            rows[hop - 1] += source.sum(axis=0)
        watch.advance()
    return Fitted({"transition": smoothed(pairs, rows, options.smoothing, data.model.width)}, {}, {"hops": hops})


def multi_hot(experts: NDArray[np.int16], width: int) -> NDArray[np.float32]:
    """1 where an expert was chosen, [T, L, E], of ``experts`` [T, L, k], in which -1 is none."""
    hot = np.zeros((*experts.shape[:2], width + 1), np.float32)
    np.put_along_axis(hot, np.where(experts < 0, width, experts).astype(np.int64), 1, axis=2)
    return hot[..., :width]


def hop_pairs(hot: NDArray[Any], hop: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """``hot`` [T, L, E], and what lies ``hop`` layers after each row; both zero where the prompt ends before."""
    tokens, layers, width = hot.shape
    flat = hot.reshape(tokens * layers, width)
    later = np.zeros_like(flat)
    later[: max(len(flat) - hop, 0)] = flat[hop:]
    source = flat.copy()
    source[max(len(flat) - hop, 0) :] = 0
    return source.reshape(hot.shape), later.reshape(hot.shape)


def smoothed(pairs: NDArray[Any], rows: NDArray[Any], weight: float, chosen: int) -> NDArray[np.float32]:
    """Shares of ``rows`` [H, L, E] in ``pairs`` [H, L, E, E], as if ``weight`` more tokens had gone the average way.

    ``chosen`` is k: the average is over tokens, each of which has k experts.
    """
    tokens = np.maximum(rows.sum(axis=2, keepdims=True) / chosen, 1)
    average = pairs.sum(axis=2, keepdims=True) / (tokens[..., None] * chosen)
    shares: NDArray[np.float32] = ((pairs + weight * average) / np.maximum(rows + weight, 1e-12)[..., None]).astype(
        np.float32
    )
    return shares


POPULARITY = Trainer(fit_popularity)
MARKOV = Trainer(fit_markov, MarkovOptions)
