"""Predictions + residency + allowance → speculative reads, and what became of each. No torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice
from time import perf_counter, perf_counter_ns, sleep

import numpy as np

from foregate.events import SILENCE, EventHub, Fate, PredictionMade, ReadEnded, ReadSubmitted, SpeculationEnded
from foregate.experts.cache import ExpertCache
from foregate.interfaces import Ticket, Transfer
from foregate.prefetch.controller import Controller
from foregate.types import ExpertKey, Moment, Prediction, StepStats

SETTLE_S = 1.0
"""Seconds to wait for chunks that were being read when their transfer was cancelled."""


class Prefetcher:
    """Owns every staged expert from its submission until it is claimed, expires or is cancelled.

    ``issued == used + wasted + cancelled + len(pending)`` at any time. ``may_stream``: a prompt may read the next layer
    ahead whole, which is no prediction and needs no predictor.
    """

    def __init__(
        self,
        cache: ExpertCache,
        transfer: Transfer,
        controller: Controller,
        *,
        experts: Sequence[int],
        top_k: int,
        may_stream: bool = True,
        events: EventHub = SILENCE,
    ) -> None:
        self.events = events
        self.may_stream = may_stream
        self.controller = controller
        self.stats = StepStats()
        self._cache = cache
        self._transfer = transfer
        self._experts = experts
        self._top_k = top_k
        self._tickets: dict[ExpertKey, Ticket] = {}
        self._dying: dict[ExpertKey, Ticket] = {}
        self._told: set[ExpertKey] = set()
        self._predicted_at: dict[int, float] = {}
        # True in prefill, whose whole-layer reads say nothing about the predictor.
        self.streaming = False

    @property
    def pending(self) -> int:
        """Speculative reads whose fate is open."""
        return len(self._tickets)

    @property
    def wanted(self) -> int:
        """Speculative reads that a layer may issue now; 0 means that the predictor need not be asked."""
        return self.controller.allowance(self._top_k) if self._cache.staging else 0

    def begin(self) -> None:
        """A sequence starts: windows of an earlier one are over."""
        self._predicted_at.clear()

    def consider(self, layer: int, moment: Moment, predictions: Sequence[Prediction]) -> None:
        """At ``moment`` of MoE layer ``layer``: submit what is predicted and absent, nearest layer first.

        Layers from L on are the next token's; what has been routed already, or lies a token or more away, is dropped.
        """
        self._reap()
        now = perf_counter()
        self._tell_predictions(layer, moment, predictions)
        width = self.controller.fixed or self._top_k
        first = layer + (moment is Moment.AFTER_ROUTING)
        for prediction in sorted(predictions, key=lambda p: p.layer):
            if first <= prediction.layer < first + len(self._experts):
                target = prediction.layer % len(self._experts)
                self._predicted_at.setdefault(target, now)
                there = self._experts[target]
                real = (int(e) for e in prediction.experts if _is_expert(e, there))
                self._submit(target, list(islice(real, width)), self.controller.allowance(self._top_k))

    def stream_ahead(self, layer: int) -> None:
        """Prefill: read the whole of ``layer`` ahead, as far as staging has room."""
        self._reap()
        if layer < len(self._experts) and self.may_stream:
            self._submit(layer, range(self._experts[layer]), self._experts[layer])

    def arrived(self, layer: int) -> None:
        """The routing of ``layer`` is known: its window is over."""
        predicted = self._predicted_at.pop(layer, None)
        if predicted is not None:
            self.controller.saw_window(perf_counter() - predicted)

    def claim(self, key: ExpertKey) -> Ticket | None:
        """The ticket of a staged expert that is needed now, or None. One that is being cancelled is revived."""
        self._reap()
        ticket = self._tickets.pop(key, None)
        if ticket is None:
            ticket = self._dying.pop(key, None)
            if ticket is not None:
                self.stats.cancelled -= 1
                self._tell_fate(key, Fate.REVIVED)
        if ticket is not None:
            self.stats.used += 1
            self._judge(used=True)
            self._tell_fate(key, Fate.USED)
            if ticket.ok:
                self.tell_end(ticket)
        return ticket

    def expire(self, layer: int | None = None, but: Collection[ExpertKey] = ()) -> None:
        """Give up what is staged for ``layer`` (None: for any) and was not used, ``but`` what still will be."""
        for key in [k for k in self._tickets if (layer is None or k.layer == layer) and k not in but]:
            self._give_up(key, self._tickets.pop(key))
        self._reap()

    def settle(self) -> None:
        """Wait until no cancelled read writes to a slot any more; one that hangs is left to the transfer's time-out."""
        deadline = perf_counter() + SETTLE_S
        while self._dying and perf_counter() < deadline:
            self._reap()
            sleep(1e-4)
        self._reap()

    def _submit(self, layer: int, experts: Sequence[int], allowed: int) -> None:
        for expert in experts:
            if allowed <= 0 or not self._cache.staging_room:
                return
            key = ExpertKey(layer, expert)
            if self._cache.state(key) is not None:
                continue
            slot = self._cache.stage(key)
            if slot is None:
                return
            self._tickets[key] = self._transfer.submit(key, slot, speculative=True)
            if self.events.on:
                self.events.emit(ReadSubmitted(perf_counter_ns(), key, True))
            self.stats.issued += 1
            allowed -= 1

    def _give_up(self, key: ExpertKey, ticket: Ticket) -> None:
        self._judge(used=False)
        if ticket.done:
            self.stats.wasted += 1
            self._tell_fate(key, Fate.WASTED)
            self._let_go(key, ticket)
            return
        self.stats.cancelled += 1
        self._tell_fate(key, Fate.CANCELLED)
        if self._transfer.cancel(ticket):
            self._let_go(key, ticket)
        else:
            self._dying[key] = ticket

    def _judge(self, *, used: bool) -> None:
        if not self.streaming:
            self.controller.judge(used=used)

    def _reap(self) -> None:
        if self.events.on:
            self._tell_arrivals()
        for key in [k for k, ticket in self._dying.items() if ticket.done]:
            self._let_go(key, self._dying.pop(key))

    def _let_go(self, key: ExpertKey, ticket: Ticket) -> None:
        self._cache.drop(key)
        self.tell_end(ticket)

    # Telling

    def tell_end(self, ticket: Ticket) -> None:
        """To listeners: the read of ``ticket`` has ended, well or not."""
        if ticket.key in self._told:
            self._told.remove(ticket.key)
        elif self.events.on:
            now = perf_counter_ns()
            self.events.emit(ReadEnded(now, ticket.key, ticket.speculative, ticket.ok, tuple(ticket.spans)))

    def _tell_arrivals(self) -> None:
        """What has been read ahead since the last look."""
        for key, ticket in self._tickets.items():
            if key not in self._told and ticket.ok:
                self.tell_end(ticket)
                self._told.add(key)

    def _tell_fate(self, key: ExpertKey, fate: Fate) -> None:
        if self.events.on:
            self.events.emit(SpeculationEnded(perf_counter_ns(), key, fate))

    def _tell_predictions(self, layer: int, moment: Moment, predictions: Sequence[Prediction]) -> None:
        if self.events.on:
            for p in predictions:
                self.events.emit(PredictionMade(perf_counter_ns(), layer, moment, p.layer, tuple(p.experts)))


def _is_expert(value: object, experts: int) -> bool:
    """Predictors are strangers' code: what they name may not exist."""
    return isinstance(value, (int, np.integer)) and bool(0 <= value < experts)
