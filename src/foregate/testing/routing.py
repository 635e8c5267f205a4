"""Seeded traces of a made-up model whose routing can be learned: for tests of training and evaluation. No torch.

A residual stream grows layer by layer, by a mixing with the previous token and by the chosen experts' outputs; each
router reads its norm. Tokens follow a Markov chain. Shapes: T tokens, L layers, E experts, k chosen, D hidden.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.trace.header import FeatureInfo, Header, ModelInfo, RunInfo, ScoreInfo
from foregate.trace.record import PromptRecord
from foregate.trace.writer import TraceWriter

Array = NDArray[Any]
FEATURES = ("pre_attention", "residual", "router_input")


class MadeModel:
    """Seeded weights of ``layers`` layers; ``route`` gives what a trace holds of a sequence of token ids."""

    def __init__(
        self, layers: int = 4, experts: int = 8, top_k: int = 2, hidden: int = 16, vocabulary: int = 24
    ) -> None:
        rng = np.random.default_rng(7)
        self.layers, self.experts, self.top_k, self.hidden = layers, experts, top_k, hidden
        self.embedding = rng.normal(size=(vocabulary, hidden))
        self.mixing = rng.normal(size=(layers, hidden, hidden)) / np.sqrt(hidden)
        self.norms = rng.uniform(0.5, 1.5, (layers, hidden))
        self.routers = rng.normal(size=(layers, experts, hidden)) / np.sqrt(hidden)
        self.outputs = rng.normal(size=(layers, experts, hidden))
        self.chain = rng.dirichlet(np.full(vocabulary, 0.1), vocabulary)

    def tokens(self, length: int, rng: np.random.Generator) -> Array:
        """A walk through the chain, [T]."""
        walk = [int(rng.integers(len(self.chain)))]
        while len(walk) < length:
            walk.append(int(rng.choice(len(self.chain), p=self.chain[walk[-1]])))
        return np.asarray(walk)

    def route(self, tokens: Array) -> dict[str, Array]:
        """``experts`` and ``weights`` [T, L, k], ``scores`` [T, L, E] (probabilities), the features [T, L, D]."""
        stream = self.embedding[tokens]
        found: dict[str, list[Array]] = {name: [] for name in ("experts", "weights", "scores", *FEATURES)}
        for layer in range(self.layers):
            normed = stream / _rms(stream)
            before = np.vstack([np.zeros((1, self.hidden)), normed[:-1]])
            residual = stream + 0.4 * (0.5 * normed + 0.5 * before) @ self.mixing[layer]
            read = residual / _rms(residual) * self.norms[layer]
            logits = 2 * read @ self.routers[layer].T
            scores = np.exp(logits - logits.max(1, keepdims=True))
            scores /= scores.sum(1, keepdims=True)
            chosen = np.argsort(-scores, axis=1, kind="stable")[:, : self.top_k]
            weights = np.take_along_axis(scores, chosen, axis=1)
            stream = residual + 0.3 * np.einsum("tk,tkd->td", weights, self.outputs[layer][chosen])
            values = (chosen, weights, scores, normed, residual, read)
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
        return {name: np.stack(values, axis=1) for name, values in found.items()}


def made_trace(
    out: Path,
    *,
    prompts: int = 40,
    tokens: int = 24,
    seed: int = 0,
    name: str = "made",
    domain: str = "made",
    features: Collection[str] = FEATURES,
    fingerprint: str = "made",
    model: MadeModel | None = None,
) -> Path:
    """Write a trace of ``prompts`` prompts of 4 to ``tokens`` tokens into ``out``, and return it."""
    made = model or MadeModel()
    rng = np.random.default_rng(seed)
    with TraceWriter(out) as writer:
        writer.begin(_header(made, features, fingerprint))
        for number in range(prompts):
            ids = made.tokens(int(rng.integers(4, tokens + 1)), rng)
            writer.add(_record(f"{name}/{number}", domain, ids, made.route(ids), features))
        writer.finish()
    return out


def _header(made: MadeModel, features: Collection[str], fingerprint: str) -> Header:
    layers = tuple(range(made.layers))
    info = ModelInfo(
        name="made",
        fingerprint=fingerprint,
        model_type="made",
        dtype="float32",
        hidden_size=made.hidden,
        moe_layers=layers,
        experts_per_layer=(made.experts,) * made.layers,
        top_k=(made.top_k,) * made.layers,
    )
    run = RunInfo("made", {}, 0, {"name": "made"}, {}, "2026-11-28T00:00:00Z")
    kinds = {name: FeatureInfo("float16", (made.hidden,), layers) for name in features}
    return Header(info, (run,), ScoreInfo(made.experts, "probabilities"), (), kinds)


def _record(prompt: str, domain: str, ids: Array, found: dict[str, Array], features: Collection[str]) -> PromptRecord:
    length = len(ids)
    return PromptRecord(
        prompt=prompt,
        domain=domain,
        positions=np.arange(length),
        token_ids=ids,
        decode=np.arange(length) >= 4,
        passes=np.zeros(length, int),
        experts=found["experts"],
        weights=found["weights"],
        scores=found["scores"],
        features={name: found[name].astype(np.float16) for name in features},
    )


def _rms(values: Array) -> Array:
    rms: Array = np.sqrt((values**2).mean(-1, keepdims=True))
    return rms
