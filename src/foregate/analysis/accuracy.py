"""How well later layers can be predicted, by hop: scored on test prompts with the counts of train prompts.

Shapes: T tokens of a batch, L layers, E experts, k chosen, H hops, G prompts x phases of a batch, M metrics.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.evidence import Evidence, ranks
from foregate.analysis.misses import MissMask
from foregate.analysis.pairs import PairCounts
from foregate.analysis.prompt import Prompt, multi_hot
from foregate.analysis.ratio import RatioSums
from foregate.analysis.settings import Settings

METHODS = ("layer", "prefix", "popularity", "previous-token")
PHASES = ("prefill", "decode")
METRICS = ("top1", "recall_k", "recall_2k", "exact_set")
"""top1: best guess among the k chosen; recall_k: share of the k chosen among the k best guesses; exact_set: all k."""
DECAY = 0.5
"""Weight of the evidence of a layer against that of the next one: neighbouring layers say the same thing twice."""
BATCH = 2_048
"""Tokens scored together, whole prompts; one multi-hot batch is at most 2 x BATCH x L x E x 4 bytes."""

Array = NDArray[Any]


class Accuracy:
    """Scores test prompts. ``hops`` [D, methods, phases, H + 1, M] and ``pairs`` [methods, phases, L, L, M] fill up."""

    def __init__(self, train: PairCounts, domains: tuple[str, ...], test_prompts: int, settings: Settings) -> None:
        shape = train.shape
        self.shape, self.settings, self.domains = shape, settings, domains
        self.evidence = Evidence(train)
        self.longest = train.hops
        self.misses = [MissMask(shape, share, settings.replay_events) for share in settings.miss_residencies]
        self.metrics = METRICS + tuple(f"recall_k on LRU misses at {mask.name}" for mask in self.misses)
        size = (len(METHODS), len(PHASES))
        self.hops = RatioSums((len(domains), *size, self.longest + 1, len(self.metrics)))
        self.pairs = np.zeros((2, *size, shape.layers, shape.layers, len(self.metrics)))
        self.tokens = 0
        self._limit = min(settings.prompt_tokens, max(16, -(-settings.eval_tokens // max(1, test_prompts))))
        self._waiting: list[tuple[Prompt, Array, Array]] = []
        self._held = 0

    def add(self, prompt: Prompt) -> None:
        """Score one test prompt: at most the tokens that are its share, evenly spread."""
        missed = np.stack([mask.add(prompt) for mask in self.misses]) if self.misses else np.zeros((0, 0, 0, 0))
        keep = np.unique(np.linspace(0, prompt.tokens - 1, min(self._limit, prompt.tokens)).astype(int))
        self._waiting.append((prompt, keep, missed[:, keep]))
        self._held += len(keep)
        self.tokens += len(keep)
        if self._held >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Score what is waiting for a full batch."""
        if self._waiting:
            batch = _Batch(self._waiting, self)
            for later in range(self.shape.layers):
                batch.score(later)
            batch.close()
        self._waiting, self._held = [], 0


class _Batch:
    """Whole prompts scored together; sums per prompt and phase are kept until ``close``."""

    def __init__(self, waiting: list[tuple[Prompt, Array, Array]], owner: Accuracy) -> None:
        self.owner = owner
        self.experts = np.concatenate([prompt.experts[keep] for prompt, keep, _ in waiting])
        self.missed = np.concatenate([missed for _, _, missed in waiting], axis=1)
        self.group = np.concatenate([2 * n + prompt.decode[keep] for n, (prompt, keep, _) in enumerate(waiting)])
        before = [prompt.experts[np.maximum(keep - 1, 0)] for prompt, keep, _ in waiting]
        first = np.concatenate([keep == 0 for _, keep, _ in waiting])
        self.previous = np.where(first[:, None, None], -1, np.concatenate(before))
        self.domain = [owner.domains.index(prompt.domain) for prompt, _, _ in waiting]
        self.groups = 2 * len(waiting)
        self.chosen = multi_hot(self.experts, owner.shape.experts)
        # above and below the line: [2, groups, methods, H + 1, M]
        self.sums = np.zeros((2, self.groups, len(METHODS), owner.longest + 1, len(owner.metrics)))

    def score(self, later: int) -> None:
        """All predictions of layer ``later``; those that need no other layer count for every hop that reaches it."""
        owner, evidence = self.owner, self.owner.evidence
        top_k = owner.shape.top_k[later]
        true = self.experts[:, later, :top_k]
        below = self._below(later, top_k)
        first = max(0, later - owner.longest)
        popular = np.broadcast_to(evidence.popularity[later], (len(true), owner.shape.experts))
        last = multi_hot(self.previous[:, later], owner.shape.experts) + popular
        for method, scores in ((2, popular), (3, last)):
            above = self._above(ranks(scores, true), later, top_k)
            for layer in range(first, later):
                self._note(method, layer, later, above, below)
            if later == 0:  # hop 0 holds layer 0, which no earlier layer can predict
                self._note(method, 0, 0, above, below)
        prior, past = evidence.prior(later), np.zeros(popular.shape, np.float32)
        for layer in range(first, later):
            lift = evidence.lift(layer, later)
            found = evidence.markov(self.chosen[:, layer], lift, later)
            self._note(0, layer, later, self._above(ranks(found, true), later, top_k), below)
            past = DECAY * past + evidence.support(self.chosen[:, layer], lift, layer, later)
            self._note(1, layer, later, self._above(ranks(prior + past, true), later, top_k), below)

    def close(self) -> None:
        """Hand the sums of every prompt over."""
        for group in range(self.groups):
            above, below = self.sums[0, group], self.sums[1, group]
            if below.any():
                self.owner.hops.add(above, below, (self.domain[group // 2], slice(None), group % 2))

    def _above(self, places: Array, later: int, top_k: int) -> Array:
        """Numerators of the metrics, summed by group: [M, G]."""
        found = places < top_k
        values = [(places == 0).any(axis=1), found.mean(axis=1), (places < 2 * top_k).mean(axis=1), found.all(axis=1)]
        values += [(found & missed[:, later, :top_k]).sum(axis=1) for missed in self.missed]
        return np.stack([self._by_group(value) for value in values])

    def _below(self, later: int, top_k: int) -> Array:
        """Denominators [M, G]: tokens, and missed experts."""
        values = [np.ones(len(self.group))] * len(METRICS)
        values += [missed[:, later, :top_k].sum(axis=1) for missed in self.missed]
        return np.stack([self._by_group(value) for value in values])

    def _by_group(self, values: Array) -> Array:
        return np.bincount(self.group, weights=values, minlength=self.groups)

    def _note(self, method: int, layer: int, later: int, above: Array, below: Array) -> None:
        for number, part in enumerate((above, below)):
            self.sums[number, :, method, later - layer] += part.T
            for phase in range(2):
                self.owner.pairs[number, method, phase, layer, later] += part[:, phase::2].sum(axis=1)


def chance(metric: str, top_k: int, experts: int) -> float:
    """What guessing at random gives. NaN for a metric that is not over all experts, where it is that of recall_k."""
    if metric == "exact_set":
        from math import comb

        return 1 / comb(experts, top_k)
    return min(1.0, (2 * top_k if metric == "recall_2k" else top_k) / experts)
