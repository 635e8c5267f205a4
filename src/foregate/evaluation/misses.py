"""Recall over what a cache does not hold: the number that decides speed. Residency is of the cache alone, no prefetch.

Shapes: T decode tokens of a prompt, L MoE layers, k experts chosen, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.belady import Belady
from foregate.analysis.prompt import Shape
from foregate.analysis.replay import Event, Keys, Replay
from foregate.analysis.worths import Worths
from foregate.evaluation.held_out import HeldPrompt
from foregate.experts.echo import Echo
from foregate.experts.policy import POLICIES
from foregate.interfaces import EvictionPolicy
from foregate.sim.replay import decode_events
from foregate.types import ExpertKey


def echo_worths(prompts: Sequence[HeldPrompt], shape: Shape) -> tuple[list[NDArray[np.float32]], bool]:
    """What ``echo`` knows once each layer of each token is routed: [T, L, E] of every prompt, one after another.

    Also whether it knew the routers' scores, or choices alone.
    """
    known, out = Worths(), []
    for prompt in prompts:
        table = np.zeros((prompt.tokens, shape.layers, shape.experts), np.float32)
        for token in range(prompt.tokens):
            for layer, size in enumerate(shape.experts_per_layer):
                scores = None if prompt.scores is None else prompt.scores[token, layer, None, :size]
                worth = known.of(layer, prompt.experts[token, layer, None], scores)
                table[token, layer, : len(worth)] = worth
        out.append(table)
    return out, known.scored


def residents(
    prompts: Sequence[HeldPrompt],
    shape: Shape,
    policy: str,
    slots: int,
    worths: Sequence[NDArray[np.float32]] | None = None,
) -> list[NDArray[np.bool_]]:
    """What a cache of ``slots`` experts holds as each layer of each token begins: [T, L, E] of every prompt.

    ``worths``: see ``echo_worths``; ``echo`` takes choices from the accesses without.
    Cold before the first prompt, then kept from prompt to prompt; only decode tokens are replayed.
    """
    keys = Keys(shape)
    events = [decode_events(keys, prompt.experts) for prompt in prompts]
    rule = Belady([event for some in events for event in some]) if policy == "belady" else POLICIES.load(policy)()
    watched = _Watched(rule, np.zeros((shape.layers, shape.experts), bool))
    replay = Replay(watched, slots)
    told = worths if isinstance(rule, Echo) and worths is not None else [None] * len(prompts)
    return [_watch(some, replay, watched, shape, known) for some, known in zip(events, told, strict=True)]


class _Watched:
    """A policy that marks in ``held`` [L, E] what the cache holds: it is told of every entry and every eviction."""

    def __init__(self, rule: EvictionPolicy, held: NDArray[np.bool_]) -> None:
        self.held = held
        self.victim = rule.victim
        self.rule = rule

    def touch(self, key: ExpertKey) -> None:
        self.held[key] = True
        self.rule.touch(key)

    def forget(self, key: ExpertKey) -> None:
        self.held[key] = False
        self.rule.forget(key)


def _watch(
    events: Sequence[Event], replay: Replay, watched: _Watched, shape: Shape, worths: NDArray[np.float32] | None
) -> NDArray[np.bool_]:
    out = np.zeros((len(events) // shape.layers, shape.layers, shape.experts), bool)
    for number, event in enumerate(events):
        token, layer = divmod(number, shape.layers)
        out[token, layer] = watched.held[layer]
        if worths is not None and isinstance(watched.rule, Echo):
            watched.rule.tell(layer, worths[token, layer])
        replay.run(event)
    return out


def covered(
    ranks: NDArray[np.int16], chosen: NDArray[np.int32], resident: NDArray[np.bool_], reads: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Misses that the first ``reads`` absent experts of each ranking cover, misses, and experts read: each [L].

    ``ranks`` [T, L, E]; every method may read ``reads`` absent experts for a layer: equal bytes.
    """
    valid = ranks >= 0
    named = np.where(valid, ranks, 0)
    absent = valid & ~np.take_along_axis(resident, named, axis=2)
    read = absent & (np.cumsum(absent, axis=2) <= reads)
    is_chosen = chosen >= 0
    missing = is_chosen & ~np.take_along_axis(resident, np.where(is_chosen, chosen, 0), axis=2)
    wanted = np.zeros(resident.shape, bool)
    rows = np.nonzero(missing)
    wanted[rows[0], rows[1], chosen[missing]] = True
    hit = read & np.take_along_axis(wanted, named, axis=2)
    by_layer = [counted.sum(axis=(0, 2)).astype(float) for counted in (hit, missing, read)]
    return by_layer[0], by_layer[1], by_layer[2]
