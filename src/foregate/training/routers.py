"""The routers and norms of a model, recovered from a trace by least squares: no checkpoint is needed, and no torch.

A router's logits are linear in its input up to a number per token, so log-probabilities and inputs give its weights
back (minus their mean over experts). Shapes: L layers, E experts of the widest layer, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foregate.errors import TraceError
from foregate.training.dataset import TRAIN, Dataset

ENOUGH = 8192
"""Tokens: noise of half-precision scores is far below a logit's spread with a few thousand."""


@dataclass(frozen=True)
class Routers:
    """``weight`` [L, E, D] and ``bias`` [L, E] give centred logits of a router's input; ``norm`` [L, D] is the gain of
    the norm before it, so that the input is norm · r / rms(r) for the residual r."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    norm: NDArray[np.float32]


def recover(data: Dataset) -> Routers:
    """Routers of ``data``'s model. Raises TraceError where the traces have no scores."""
    if not data.score_kind:
        raise TraceError("these traces have no router scores; trace with --scores")
    layers, experts, width = data.layers, data.experts, data.model.hidden_size
    gram = np.zeros((layers, width + 1, width + 1))
    moment = np.zeros((layers, width + 1, experts))
    gain = np.zeros((2, layers, width))
    seen = 0
    for block in data.blocks(TRAIN, 1024, ("router_input", "residual"), shuffle=(0, 0)):
        assert block.scores is not None
        x = np.nan_to_num(block.features["router_input"]).astype(np.float64)
        x = np.concatenate([x, np.ones((*x.shape[:2], 1))], axis=2).transpose(1, 0, 2)
        logits = _centred(block.scores, data).transpose(1, 0, 2)
        gram += x.transpose(0, 2, 1) @ x
        moment += x.transpose(0, 2, 1) @ logits
        unit = unit_rms(np.nan_to_num(block.features["residual"]).astype(np.float64))
        gain += np.stack([(unit * x.transpose(1, 0, 2)[..., :-1]).sum(0), (unit * unit).sum(0)])
        seen += block.tokens
        if seen >= ENOUGH:
            break
    ridge = 1e-6 * np.trace(gram, axis1=1, axis2=2)[:, None, None] / (width + 1) * np.eye(width + 1)
    solved = np.linalg.solve(gram + ridge, moment)
    norm = gain[0] / np.maximum(gain[1], 1e-9)
    weight = solved[:, :-1].transpose(0, 2, 1)
    return Routers(weight.astype(np.float32), solved[:, -1].astype(np.float32), norm.astype(np.float32))


def unit_rms(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """``x`` divided by its root mean square over the last axis."""
    rms: NDArray[np.float64] = np.sqrt((x * x).mean(-1, keepdims=True) + 1e-9)
    return x / rms


def _centred(scores: NDArray[np.float32], data: Dataset) -> NDArray[np.float64]:
    """Logits minus their mean over the experts that a layer has; 0 for those that it does not have."""
    logits = scores.astype(np.float64) if data.score_kind == "logits" else np.log(np.maximum(scores, 1e-7))
    exists = ~np.isnan(logits)
    filled = np.where(exists, logits, 0)
    mean = filled.sum(-1, keepdims=True) / np.maximum(exists.sum(-1, keepdims=True), 1)
    return np.where(exists, filled - mean, 0)
