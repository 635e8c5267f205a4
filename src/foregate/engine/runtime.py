"""What transformers calls instead of its own experts: routing in, output out, the pipeline in between.

Shapes: T tokens, k experts chosen, E experts, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foregate.engine.clock import Clock
from foregate.engine.following import AfterExperts, Following
from foregate.engine.signals import ModelSignals
from foregate.engine.speculation import Speculation
from foregate.events import ControllerDecided, Part, TimeSpent, ns
from foregate.experts.cache import ExpertCache
from foregate.experts.compute import (
    End,
    SlotViews,
    Weights,
    at_the_end,
    expert_forward,
    experts_forward,
    experts_of,
)
from foregate.interfaces import Advised, Predictor, RoutingAware, RoutingObserver
from foregate.native import kernels
from foregate.native.decoder_layer import Choice, DecoderLayer
from foregate.predictors.choice import beginning, reach
from foregate.prefetch.pipeline import Compute, Pipeline, Together
from foregate.prefetch.prefetcher import Prefetcher
from foregate.types import ExpertKey, ExpertLayout, Moment, Phase, RoutingStep

GATHER_TOKENS = 8
"""Up to this many tokens the experts run in order of arrival and [T, k, D] holds their outputs; above, in ascending
order into one fp32 sum. Chosen by T alone, never by residency: the order of accumulation is part of the result."""

log = logging.getLogger("foregate")
Floats = NDArray[np.float32]
Product = Callable[[Sequence[Weights], Sequence[int]], None]
"""Writes what experts give to rows of a token's outputs."""
Begin = Callable[[Sequence[Weights], Sequence[int]], End]
"""Has other threads begin a ``Product``."""

STAGING_SHARE = 4
"""One slot in so many is set aside for reading the next layer ahead, if the pool cannot hold all experts."""

STREAM_SHARE = 0.5
"""Share of a layer's experts that a long prompt must use for the next layer to be read ahead whole: the disk would
idle, and what turns out not to be needed is cancelled at once."""


class ExpertRuntime(Speculation):
    """Runs the experts of every MoE layer of one model. ``phase`` and ``position`` are set before each forward."""

    _computes_less = False
    """Whether experts may be left out."""

    def __init__(
        self,
        *,
        cache: ExpertCache,
        pipeline: Pipeline,
        prefetcher: Prefetcher,
        predictor: Predictor,
        signals: ModelSignals,
        views: SlotViews,
        layout_of: Callable[[ExpertKey], ExpertLayout],
        experts: Sequence[int],
        decode_staging: int,
        clock: Clock,
        early: NDArray[np.int32] | None = None,
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(predictor, prefetcher, signals)
        self.position = 0
        self.observers: list[RoutingObserver] = []
        self._cache = cache
        self._pipeline = pipeline
        self._since = 0
        self._views = views
        self._layout_of = layout_of
        self._experts = experts
        self._decode_staging = decode_staging
        self._clock = clock
        self._early = np.zeros(1, np.int32) if early is None else early
        """Whether layers have what is resident begun before they say what they have chosen."""
        self._forget = forget
        """Has what was begun for the next token dropped: its experts may lose their slots."""
        signals.reached = self._reached
        self._informed = cache.policy if isinstance(cache.policy, RoutingAware) else None
        self._advise: Any = getattr(predictor, "advise", None) if isinstance(cache.policy, Advised) else None
        self.advice_fault = ""
        """Why the predictor is asked for advice no more; empty where it is, or has none."""
        signals.listen(on=self._informed is not None)

    @property
    def advised(self) -> bool:
        """Whether the eviction policy takes advice from the predictor."""
        policy = self._cache.policy
        return self._advise is not None and isinstance(policy, Advised) and policy.takes_advice()

    def begin_prefill(self) -> None:
        """A prompt starts: staging will hold whole layers."""
        self.let_go()
        self.phase, self.position = Phase.PREFILL, 0
        self._prefetcher.begin()
        self._tried(self.predictor.reset)

    def begin_chunk(self, position: int) -> None:
        """The prompt's tokens from ``position`` on come next."""
        self.position = position

    def end_prefill(self) -> None:
        """The prompt has been read: nothing of it stays staged."""
        self.finish()
        self._cache.set_staging(0)

    def begin_decode(self, position: int, token_id: int) -> None:
        """A forward of ``token_id`` at ``position`` starts. Slots are set aside only while speculation is on."""
        self.phase, self.position = Phase.DECODE, position
        self._signals.position, self._signals.token_id = position, token_id
        moment, listened = self.predictor.moment, self._events.on
        self._signals.early = listened or moment is Moment.BEFORE_ATTENTION
        self._signals.late = listened or moment is Moment.AFTER_ATTENTION
        # Who is asked before the choice is told may change what lies where.
        early = not self._signals.late and not self._computes_less
        if early != self._early[0]:
            self._forget()
            self._early[0] = early
        self._beginning = beginning(self.predictor) if moment is Moment.AFTER_ROUTING else None
        controller = self._prefetcher.controller
        controller.begin_step()
        wanted = 0
        if controller.speculating:
            wanted = controller.staging(reach(self.predictor), self._decode_staging)
        if wanted != self._cache.staging:
            self._forget()
            self._cache.set_staging(wanted)
        if self._events.on:
            decided, speculating = controller.decision, controller.speculating
            now = perf_counter_ns()
            self._events.emit(ControllerDecided(now, decided.enabled, speculating, decided.reason))

    def let_go(self) -> None:
        """Nobody predicts or computes for this any more."""
        self._early[0] = 0
        self._forget()
        self.drop_begun()
        kernels.drop_begun_experts()

    def finish(self) -> None:
        """The sequence ended, or broke: nothing stays staged, in flight or being predicted."""
        self.let_go()
        self._prefetcher.expire()
        self._prefetcher.settle()

    def forward(self, layer: int, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Output [T, D] of MoE layer ``layer`` for ``x`` [T, D], routed to ``index`` [T, k] with ``weights`` [T, k]."""
        self._forget()
        step = self._routed(layer, *_numbers(index, weights))
        if _few(index):
            return self._gather(layer, module, x, index, weights, step)
        self._tell(step)
        return self._sum(layer, module, x, index, weights)

    def forward_one(self, layer: int, module: nn.Module, kernel: DecoderLayer, then: Following) -> None:
        """``forward`` for the one token that ``kernel`` has routed, into what it hands on; ``then`` follows at once:
        what is left to be said of this layer is said while the experts of the next are being computed."""
        choice = kernel.choice
        ranks: list[int] = choice.experts[0].tolist()
        begun = kernel.residents.begun if self._early[0] and kernel.residents is not None else 0
        since = self._clock.now if begun else 0
        product = partial(experts_of, kernel, module)
        try:
            after = AfterExperts(kernel, then, begun, self._clock)
            step = self._routed(layer, choice.experts, choice.shares, choice)
            self._compute_one(layer, ranks, choice.parts, product, partial(after.begin, module), step, since, after)
        except BaseException:
            kernels.drop_begun_experts()
            raise

    def forward_scaled(self, layer: int, module: nn.Module, repeated: Tensor) -> Tensor:
        """Llama 4's form: ``repeated`` [E*T, D] holds each token scaled for each expert, zero where not chosen."""
        rows = repeated.view(self._experts[layer], -1, repeated.shape[-1])
        scores, logits = self._signals.router_output(layer)
        index = logits.topk(self._signals.top_k, dim=-1).indices
        self._route(layer, index, scores.gather(1, index))
        out = torch.zeros_like(rows)

        def compute(expert: int, slot: int) -> None:
            token = (index == expert).any(dim=1)
            out[expert, token] = self._expert(ExpertKey(layer, expert), module, rows[expert, token], slot)

        self._run(layer, index, compute)
        return out.view_as(repeated)

    def _route(self, layer: int, index: Tensor, weights: Tensor) -> None:
        self._tell(self._routed(layer, *_numbers(index, weights)))

    def _routed(
        self, layer: int, experts: NDArray[np.int64], weights: Floats, choice: Choice | None = None
    ) -> RoutingStep:
        """The router of ``layer`` has chosen; ``choice`` is what it gave, where that is at hand. The policy is told:
        slots are asked for next. Everybody else waits for ``_tell``, until there is something to wait for.

        Strangers get copies: what they change must reach neither what is computed nor what the policy is told.
        """
        self._tell_until_now(Part.ROUTING, layer)
        if self.phase is Phase.DECODE:
            self._prefetcher.arrived(layer)
        step = RoutingStep(layer, self.phase, self.position, experts.copy(), weights.copy())
        self._signals.told = None if choice is None else (step, choice.places)
        self._signals.on_route(step)
        if self._informed is not None:
            scores = self._signals.routed(step, None if choice is None else choice.scores)
            self._informed.observe(layer, experts, scores)
            if self._advise is not None and self.phase is Phase.DECODE and len(experts) == 1:
                self._take_advice(layer)
        return step

    def _take_advice(self, layer: int) -> None:
        """The predictor tells the policy what will be needed again, if that would be used."""
        policy: Any = self._informed
        if not policy.wants_advice(layer):
            return
        began = perf_counter()
        self._signals.layer, self._signals.moment = layer, Moment.AFTER_ROUTING
        try:
            said = self._advise(self._signals)
            if said is not None:
                policy.advise(layer, *said)
        except Exception as error:  # a stranger's advice must not decide whether the text comes out
            self._advise = None
            self.advice_fault = f"predictor {self.predictor.name!r} failed: {type(error).__name__}: {error}"
            log.warning("the cache policy gets no more advice: %s", self.advice_fault)
        ended = perf_counter()
        self._prefetcher.stats.predict_s += ended - began
        if self._events.on:
            self._events.emit(TimeSpent(ns(began), ns(ended), Part.PREDICT, layer))

    def _tell(self, step: RoutingStep) -> None:
        """The predictor, and observers, are told."""
        self.drop_begun()
        self._observe(step)
        if self.phase is Phase.DECODE and len(step.experts) <= GATHER_TOKENS:
            self._begin_predicting(step.layer)
        if self.observers:
            # What they change must not reach the predictor either, which need not have looked yet.
            seen = replace(step, experts=step.experts.copy(), weights=step.weights.copy())
            for observer in self.observers:
                observer.on_route(seen)

    def _speculate(self, layer: int, step: RoutingStep | None) -> Callable[[], None]:
        """``step``, if any, is told; what this returns asks the predictor and reads ahead."""
        if step is not None:
            self._tell(step)
        if self._events.on:  # each expert will be computed by itself, and its slot be free for others then
            kernels.drop_begun_experts()
        return partial(self._predict, layer, Moment.AFTER_ROUTING)

    def _gather(
        self,
        layer: int,
        module: nn.Module,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        step: RoutingStep | None = None,
    ) -> Tensor:
        if len(index) == 1:
            ranks = index[0].tolist()
            outs = x.new_empty((len(ranks), x.shape[-1]))

            def product(held: Sequence[Weights], rows: Sequence[int]) -> None:
                experts_forward(module, x, held, outs, rows)

            self._compute_one(layer, ranks, outs, product, partial(at_the_end, product), step)
            if kernels.combines(x, weights):
                return kernels.combine(outs, weights)
            return (outs * weights[0, :, None]).sum(dim=0, keepdim=True).to(x.dtype)
        parts = x.new_zeros((*index.shape, x.shape[-1]), dtype=torch.promote_types(x.dtype, weights.dtype))

        def compute(expert: int, slot: int) -> None:
            token, rank = torch.where(index == expert)
            out = self._expert(ExpertKey(layer, expert), module, x[token], slot)
            parts[token, rank] = (out * weights[token, rank, None]).to(parts.dtype)

        self._decode(layer, self._needed(layer, index.flatten().tolist()), compute, step)
        return parts.sum(dim=1).to(x.dtype)

    def _compute_one(
        self,
        layer: int,
        ranks: list[int],
        parts: Tensor,
        product: Product,
        begin: Begin,
        step: RoutingStep | None,
        since: int = 0,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Fill ``parts`` [k, D] with what the experts ``ranks`` [k] give for one token, by ``product``; ``then`` is
        called as soon as that is done. ``step`` is still to be told, unless there is none. ``since``: when others have
        begun already, by the clock; 0: not yet."""
        needed = self._needed(layer, ranks)
        views, layout_of, timed = self._views, self._layout_of, self._clock.timed
        if self._computes_less or len(needed) < len(ranks):  # what nobody computes counts as zero
            parts.zero_()

        def compute(expert: int, slot: int) -> None:
            timed(product, [views.weights(slot, layout_of(ExpertKey(layer, expert)))], [ranks.index(expert)])

        def together(experts: Sequence[int], slots: Sequence[int]) -> Callable[[], float]:
            pairs = zip(experts, slots, strict=True)
            held = [views.weights(slot, layout_of(ExpertKey(layer, expert))) for expert, slot in pairs]
            rows = [ranks.index(expert) for expert in experts]
            if since:
                return partial(self._clock.ended, since, begin(held, rows))
            end = timed(begin, held, rows)
            return partial(self._clock.ended, self._clock.now, end)

        def filled() -> None:
            if len(needed) < len(ranks):
                for rank, expert in enumerate(ranks):
                    parts[rank] = parts[ranks.index(expert)]
            if then is not None:
                then()

        self._decode(layer, needed, compute, step, together, filled)

    def _sum(self, layer: int, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros(x.shape, dtype=torch.float32)
        groups = _Groups(index, weights, self._experts[layer])

        def compute(expert: int, slot: int) -> None:
            token, weight = groups.of(expert)
            out = self._expert(ExpertKey(layer, expert), module, x[token], slot)
            total.index_add_(0, token, (out * weight).float())

        self._run(layer, index, compute)
        return total.to(x.dtype)

    def _run(self, layer: int, index: Tensor, compute: Compute) -> None:
        needed = self._needed(layer, index.flatten().tolist())
        if _few(index):
            self._decode(layer, needed, compute, None)
            return
        began = perf_counter_ns()
        self._make_staging(layer)
        self._pipeline.stream(layer, needed, compute, self._ahead(layer, len(needed)), self._keep(layer, index))
        self._signals.forget_all_but_last(layer)
        self._clock.forget()
        self._tell_experts(began, layer)

    def _decode(
        self,
        layer: int,
        needed: list[int],
        compute: Compute,
        step: RoutingStep | None,
        together: Together | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        began = perf_counter_ns()
        self._pipeline.decode(layer, needed, compute, partial(self._speculate, layer, step), together, then)
        beside = self._pipeline.read_beside
        if beside is not None:
            self._clock.read_beside(*beside)
        self._clock.forget()
        self._tell_experts(began, layer)

    def _tell_experts(self, began: int, layer: int) -> None:
        if self._events.on:
            self._events.emit(TimeSpent(began, perf_counter_ns(), Part.EXPERTS, layer))

    def _expert(self, key: ExpertKey, module: nn.Module, x: Tensor, slot: int) -> Tensor:
        return self._clock.timed(expert_forward, module, x, self._views.weights(slot, self._layout_of(key)))

    def _needed(self, layer: int, chosen: list[int]) -> list[int]:
        """Experts to run, each once, in the order of ``chosen``; sentinels of expert parallelism left out."""
        there = self._experts[layer]
        return [expert for expert in dict.fromkeys(chosen) if 0 <= expert < there]

    def _reached(self, layer: int, moment: Moment) -> None:
        if moment is Moment.AFTER_ATTENTION:
            self._tell_until_now(Part.ATTENTION, layer)
        self._ask_at(layer, moment)
        self._since = perf_counter_ns()

    def _tell_until_now(self, part: Part, layer: int) -> None:
        """To listeners: the time since the last hook of this layer went into ``part``."""
        if self._events.on and self._since:
            self._events.emit(TimeSpent(self._since, perf_counter_ns(), part, layer))
        self._since = 0

    def _make_staging(self, layer: int) -> None:
        """Room for the next layer: what no resident needs, and at least a quarter of a pool that cannot hold all."""
        if not self._prefetcher.may_stream:
            return
        slots, held = self._cache.pool.slots, self._cache.resident
        absent = self._experts[layer] - sum(key.layer == layer for key in held)
        after = sum(self._experts[layer + 1 : layer + 2]) - sum(key.layer == layer + 1 for key in held)
        least = 0 if slots >= sum(self._experts) else slots // STAGING_SHARE
        self._cache.set_staging(min(after, max(slots - len(held) - absent, least), slots - 1))

    def _keep(self, layer: int, index: Tensor) -> set[int] | None:
        """The layer's fair share of the slots, given to the experts most used: for the next chunk and for decoding."""
        slots, experts = self._cache.pool.slots, self._experts[layer]
        if slots >= sum(self._experts):
            return None
        room = slots - slots // STAGING_SHARE - slots // 16
        share = room * experts // sum(self._experts)
        chosen = index.flatten()
        counts = torch.bincount(chosen[(chosen >= 0) & (chosen < experts)], minlength=experts)
        return set(counts.sort(descending=True, stable=True).indices[:share].tolist())

    def _ahead(self, layer: int, used: int) -> Callable[[], None]:
        if used < STREAM_SHARE * self._experts[layer]:
            return lambda: None
        return lambda: self._prefetcher.stream_ahead(layer + 1)


class _Groups:
    """Which tokens each expert gets: sorted once a layer, not searched for once an expert."""

    def __init__(self, index: Tensor, weights: Tensor, experts: int) -> None:
        ordered, order = index.flatten().sort(stable=True)
        self._token = order // index.shape[1]
        self._weight = weights.flatten()[order][:, None]
        self._bounds = torch.searchsorted(ordered, torch.arange(experts + 1, dtype=ordered.dtype)).tolist()

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens [n] of ``expert``, ascending, and their weights [n, 1]."""
        here = slice(self._bounds[expert], self._bounds[expert + 1])
        return self._token[here], self._weight[here]


def _numbers(index: Tensor, weights: Tensor) -> tuple[NDArray[np.int64], Floats]:
    return index.numpy().astype(np.int64, copy=False), weights.float().numpy()


def _few(index: Tensor) -> bool:
    return index.shape[0] <= GATHER_TOKENS
