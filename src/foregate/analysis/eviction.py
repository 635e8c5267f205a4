"""``python -m foregate.analysis.eviction TRACE…``: how much of the gap from LRU to Belady each cache policy closes.

Held-out prompts only, event-atomic, without prefetch. ``--fit`` fits the weights of ``echo`` on the training prompts.
``--predictor`` adds ``echo`` with the advice of that file.
Shapes: T tokens, L MoE layers, k chosen, E experts, D hidden, P prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.belady import Belady
from foregate.analysis.prompt import Shape
from foregate.analysis.replay import Event, Keys, Replay
from foregate.errors import ForegateError, PredictorError, TraceError
from foregate.experts.echo import PATIENCE, Echo
from foregate.experts.policy import POLICIES
from foregate.interfaces import Advised, EvictionPolicy, RoutingAware
from foregate.predictors.file import ModelIdentity, load
from foregate.predictors.reuse import Reuse, reuse_of
from foregate.trace.copying import SIDES, side_of
from foregate.trace.part import Part
from foregate.trace.reader import TraceReader

FRACTIONS, SPLIT_SEED = (0.8, 0.1, 0.1), 0
"""Train, validation and test, as in ``foregate train``."""
CHOICES = " (choices)"
"""A policy that could use the router's scores, replayed without them."""
ADVISED = " (advised)"
"""A policy that takes advice from a predictor."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Pass:
    """What one forward pass routed: ``experts`` [T, L, k], ``scores`` [T, L, E] or None; the ``residual`` [L, D] of one
    that decodes, where it was asked for."""

    experts: NDArray[np.int64]
    scores: NDArray[np.float32] | None
    residual: NDArray[np.float32] | None = None

    def layer(self, layer: int) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
        """[T, k] and [T, E] of one layer."""
        return self.experts[:, layer], None if self.scores is None else self.scores[:, layer]


Passes = list[Pass]


def held_out(
    paths: Sequence[Path], per_trace: int, sides: Sequence[str], prefill: bool, *, residual: bool = False
) -> tuple[Shape, list[Passes]]:
    """Prompts of the traces, mixed by a fixed seed, as passes. Raises TraceError where there is none, or no
    ``residual`` that is asked for."""
    found: list[Passes] = []
    shapes = []
    for reader in map(TraceReader, paths):
        model = reader.header.model
        shapes.append(Shape(model.experts_per_layer, model.top_k))
        names = [e.prompt for s in sides for e in reader.entries if side_of(e.content, FRACTIONS, SPLIT_SEED) == s]
        parts = reader.parts(prompts=set(names[:per_trace])) if names else iter(())
        found += [list(_passes(part, reader.header.scores is not None, prefill, residual)) for part in parts]
    if len(set(shapes)) != 1:
        raise TraceError(f"traces of different models: {', '.join(map(str, paths))}")
    found = [passes for passes in found if passes]
    if not found:
        raise TraceError(f"{', '.join(map(str, paths))}: no decode token on the {' or '.join(sides)} side")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(found))
    return shapes[0], [found[number] for number in order]


def _passes(part: Part, scored: bool, prefill: bool, residual: bool) -> Iterator[Pass]:
    experts = part.grid(part.experts).astype(np.int64)
    scores = part.grid(part.scores) if scored else None
    hidden = part.grid(part.feature("residual")) if residual else None
    decode, number = part.grid(part.decode)[:, 0], part.grid(part.pass_index)[:, 0]
    groups = [np.flatnonzero(~decode & (number == n)) for n in np.unique(number[~decode])] if prefill else []
    for rows in [*groups, *np.flatnonzero(decode)[:, None]]:
        known = hidden[rows[0]] if hidden is not None and decode[rows[0]] else None
        yield Pass(experts[rows], None if scores is None else scores[rows], known)


def events_of(keys: Keys, passes: Passes, layers: int) -> list[Event]:
    """One event a layer of every pass."""
    return [keys.event(n, np.unique(p.experts[:, n]).tolist()) for p in passes for n in range(layers)]


def replayed(
    name: str, prompts: Sequence[Passes], shape: Shape, slots: int, *, cold: bool, reuse: Reuse | None = None
) -> NDArray[np.int64]:
    """Hits and uses of each prompt, [P, 2]. ``cold``: every prompt begins with an empty cache and a new policy. What is
    ``ADVISED`` takes the advice of ``reuse``."""
    keys = Keys(shape)
    events = [events_of(keys, passes, shape.layers) for passes in prompts]
    counts, replay = [], None
    for number, passes in enumerate(prompts):
        if replay is None or cold:
            future = events[number] if cold else [event for some in events for event in some]
            replay = Replay(_policy(name, future), slots)
        hits, uses = replay.hits, replay.hits + replay.misses
        advice = reuse if name.endswith(ADVISED) else None
        _replay(replay, passes, events[number], shape.layers, told=not name.endswith(CHOICES), reuse=advice)
        counts.append((replay.hits - hits, replay.hits + replay.misses - uses))
    return np.array(counts)


def _replay(
    replay: Replay, passes: Passes, events: Sequence[Event], layers: int, *, told: bool, reuse: Reuse | None = None
) -> None:
    informed = replay.policy if told and isinstance(replay.policy, RoutingAware) else None
    for number, event in enumerate(events):
        seen, layer = passes[number // layers], number % layers
        if informed is not None:
            informed.observe(layer, *seen.layer(layer))
        if reuse is not None and seen.residual is not None and isinstance(informed, Advised):
            informed.advise(layer, *reuse.on(layer, seen.residual[layer]))
        for start in range(0, len(event), replay.slots):
            replay.run(event[start : start + replay.slots])


def _policy(name: str, future: Sequence[Event]) -> EvictionPolicy:
    if name == "belady":
        return Belady(future)
    policy: EvictionPolicy = POLICIES.load(name.removesuffix(CHOICES).removesuffix(ADVISED))()
    return policy


def gap_closed(mine: NDArray[np.int64], lru: NDArray[np.int64], best: NDArray[np.int64]) -> tuple[float, float, float]:
    """Share of the gap from LRU to Belady, and its 95 % interval over resampled prompts; hits and uses are [P, 2]."""
    hits = np.stack([found[:, 0] for found in (mine, lru, best)], axis=1).astype(float)
    chosen = np.random.default_rng(0).integers(0, len(hits), (RESAMPLES, len(hits)))
    totals = np.concatenate([hits.sum(axis=0)[None], hits[chosen].sum(axis=1)])
    gap = totals[:, 2] - totals[:, 1]
    shares = np.divide(totals[:, 0] - totals[:, 1], gap, out=np.zeros(len(gap)), where=gap > 0)
    low, high = np.percentile(shares[1:], [2.5, 97.5])
    return float(shares[0]), float(low), float(high)


def compare(
    arm: str, prompts: Sequence[Passes], shape: Shape, residency: float, *, cold: bool, reuse: Reuse | None = None
) -> list[dict[str, Any]]:
    """One row a policy. Raises TraceError for a pool that cannot hold one layer's choice."""
    slots = int(shape.total * residency)
    if slots < max(shape.top_k):
        raise TraceError(f"{residency:.0%} residency holds {slots} experts, fewer than one layer chooses")
    names = [*POLICIES.names, "belady"]
    if any(p.scores is not None for passes in prompts for p in passes):
        names += [name + CHOICES for name in POLICIES.names if issubclass(POLICIES.load(name), RoutingAware)]
    if reuse is not None:
        names += [name + ADVISED for name in POLICIES.names if issubclass(POLICIES.load(name), Advised)]
    found = {name: replayed(name, prompts, shape, slots, cold=cold, reuse=reuse) for name in names}
    rows = []
    for name, counts in found.items():
        closed, low, high = gap_closed(counts, found["lru"], found["belady"])
        hits, uses = counts.sum(axis=0).tolist()
        row = {"arm": arm, "residency": residency, "policy": name, "prompts": len(prompts), "uses": uses}
        rows.append({**row, "hit_rate": hits / uses, "gap_closed": closed, "low": low, "high": high})
    return rows


def fit(prompts: Sequence[Passes], layers: int, *, told: bool) -> tuple[NDArray[np.float64], float]:
    """Weights and bias of ``echo``: logistic regression of exp(-(passes to the next use - 1) / PATIENCE)."""
    rule, features, uses = Echo(), [], []
    for number, seen in enumerate(p for passes in prompts for p in passes):
        for layer in range(layers):
            experts, scores = seen.layer(layer)
            rule.observe(layer, experts, scores if told else None)
            if number >= WARM_UP:
                features.append(rule.features(layer).T)
                uses.append(np.isin(np.arange(features[-1].shape[0]), experts))
    targets: list[NDArray[np.float64]] = []
    ahead = [np.full(len(used), np.inf) for used in uses[-layers:]]
    for number in range(len(uses) - 1, -1, -1):
        targets.append(np.exp(-(ahead[number % layers] - 1) / PATIENCE))
        ahead[number % layers] = np.where(uses[number], 1.0, ahead[number % layers] + 1)
    return _logistic(np.concatenate(features).astype(float), np.concatenate(targets[::-1]))


WARM_UP = 50
"""Passes before ``echo`` has seen every expert, so that its features have all their columns."""


def _logistic(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Newton's method on soft targets, with a little ridge."""
    x = np.c_[x, np.ones(len(x))]
    weights = np.zeros(x.shape[1])
    for _ in range(15):
        p = 1 / (1 + np.exp(-(x @ weights)))
        slope = x.T @ (y - p) / len(y) - 1e-4 * weights
        weights += np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x / len(y) + 1e-4 * np.eye(len(weights)), slope)
    return weights[:-1], float(weights[-1])


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m foregate.analysis.eviction", description=__doc__)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--prompts", type=int, default=12, help="most of each trace (default: %(default)s)")
    parser.add_argument("--residency", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--fit", action="store_true", help="fit the weights of echo on training prompts instead")
    parser.add_argument("--predictor", type=Path, help="a file with advice; traces need --features residual")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    given = parser.parse_args(arguments)
    train, validation, test = SIDES
    if given.fit and given.predictor:
        parser.error("--fit knows nothing of --predictor")
    if given.fit:
        shape, prompts = held_out(given.traces, given.prompts, [train], prefill=True)
        for told in (True, False):
            weights, bias = fit(prompts, shape.layers, told=told)
            print("scores" if told else "choices", [round(w, 3) for w in weights.tolist()], round(bias, 3))
        return
    reuse = None if given.predictor is None else _advice(given.predictor, given.traces)
    for arm, prefill, cold in ARMS:
        shape, prompts = held_out(
            given.traces, given.prompts, [test, validation], prefill=prefill, residual=reuse is not None
        )
        for residency in given.residency:
            for row in compare(arm, prompts, shape, residency, cold=cold, reuse=reuse):
                print(json.dumps(row) if given.json else _line(row), flush=True)


def _advice(path: Path, traces: Sequence[Path]) -> Reuse:
    artifact = load(path)
    found = reuse_of(artifact)
    if found is None:
        raise PredictorError(f"{path}: has no advice for an eviction policy; train fusion with reuse_epochs above 0")
    for trace in traces:
        header = TraceReader(trace).header
        if header.scores is None:
            raise TraceError(f"{trace}: without the router's scores advice is not used; trace with --scores")
        artifact.check_model(ModelIdentity.of_trace(header.model))
    return found


ARMS = (("decode, cold", False, True), ("decode, kept", False, False), ("prefill and decode, kept", True, False))
"""Name; whether prefill passes are replayed; whether every prompt begins cold, or finds what the last one left."""


def _line(row: dict[str, Any]) -> str:
    closed = f"{row['gap_closed']:7.1%} [{row['low']:.1%}, {row['high']:.1%}]"
    return (
        f"{row['arm']:25} {row['residency']:4.0%}  {row['policy']:15} hits {row['hit_rate']:.3f}  gap closed {closed}"
    )


if __name__ == "__main__":
    try:
        _main()
    except ForegateError as error:
        sys.exit(f"error: {error}")
