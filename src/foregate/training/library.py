"""Chooses what the methods that remember keep: requests for ``eam``, single tokens for ``expert-map``. No torch.

Shapes: T tokens, N requests, M stored tokens, L MoE layers, E experts of the widest layer, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.predictors.eam import SCOPES, TOKEN
from foregate.training.counting import multi_hot
from foregate.training.dataset import TRAIN, Dataset, Prompt
from foregate.training.trainer import Fitted, Options, Trainer, Watch


@dataclass(frozen=True)
class ActivationOptions(Options):
    """``capacity``: requests to keep, those farthest from each other; ``scope``: see ``predictors.eam``."""

    capacity: int = 256
    scope: str = field(default=TOKEN, metadata={"choices": SCOPES})


@dataclass(frozen=True)
class MapOptions(Options):
    """``capacity``: tokens to keep, drawn at random; ``semantic_layers``: see ``predictors.expert_map``."""

    capacity: int = 512
    semantic_layers: int = 1


def fit_activation(data: Dataset, options: ActivationOptions, watch: Watch) -> Fitted:
    """How often each request used each expert, each layer summing to 1, of at most ``capacity`` requests."""
    data.require(TRAIN)
    watch.begin("count", data.count(TRAIN))
    found = []
    for prompt in data.prompts(TRAIN):
        counts = multi_hot(prompt.experts, data.experts).sum(axis=0)
        found.append(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
        watch.advance()
    requests = np.asarray(found, np.float32)
    kept = spread_out(requests.reshape(len(requests), -1), options.capacity)
    return Fitted({"library": requests[kept]}, {"scope": options.scope}, {"requests": len(requests), "kept": len(kept)})


def spread_out(rows: NDArray[np.float32], capacity: int) -> NDArray[np.int64]:
    """Indices of ``capacity`` of ``rows`` (all, if there are no more): each the one that is least like those before."""
    if len(rows) <= capacity:
        return np.arange(len(rows))
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    mean = unit.mean(axis=0)
    kept = [int((unit @ mean).argmax())]
    nearest = unit @ unit[kept[0]]
    while len(kept) < capacity:
        kept.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, unit @ unit[kept[-1]])
    return np.sort(np.asarray(kept))


def fit_maps(data: Dataset, options: MapOptions, watch: Watch) -> Fitted:
    """Router probabilities and first attention inputs of ``capacity`` tokens, drawn evenly from all prompts."""
    data.require(TRAIN)
    total = data.tokens(TRAIN)
    rng = np.random.default_rng(options.seed)
    drawn = np.sort(rng.choice(total, min(options.capacity, total), replace=False))
    watch.begin("draw", data.count(TRAIN))
    maps, inputs, start = [], [], 0
    for prompt in data.prompts(TRAIN):
        rows = drawn[(drawn >= start) & (drawn < start + prompt.tokens)] - start
        if len(rows):
            maps.append(probabilities(prompt, rows, data.score_kind))
            inputs.append(prompt.feature("pre_attention")[rows, 0])
        start += prompt.tokens
        watch.advance()
    tensors = {"maps": np.concatenate(maps).astype(np.float32), "inputs": np.concatenate(inputs).astype(np.float32)}
    return Fitted(tensors, {"semantic_layers": options.semantic_layers}, {"tokens": total, "kept": len(drawn)})


def probabilities(prompt: Prompt, rows: NDArray[np.int64], kind: str) -> NDArray[Any]:
    """Router probabilities [M, L, E] of tokens ``rows``; 0 for experts that a layer does not have."""
    assert prompt.scores is not None
    scores = prompt.scores[rows].astype(np.float32)
    if kind != "logits":
        given: NDArray[Any] = np.nan_to_num(scores)
        return given
    raised = np.exp(scores - np.nanmax(scores, axis=2, keepdims=True))
    shares: NDArray[Any] = np.nan_to_num(raised / np.nansum(raised, axis=2, keepdims=True))
    return shares


EAM = Trainer(fit_activation, ActivationOptions)
EXPERT_MAP = Trainer(fit_maps, MapOptions, features=("pre_attention",), scores=True)
