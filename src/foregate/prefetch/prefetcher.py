"""Predictions + residency + allowance → speculative reads, and what became of each. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from time import perf_counter, perf_counter_ns, sleep

import numpy as np

from foregate.events import SILENCE, EventHub, Fate, PredictionMade, ReadEnded, ReadSubmitted, SpeculationEnded
from foregate.experts.cache import ExpertCache
from foregate.interfaces import Ticket, Transfer
from foregate.prefetch.controller import Controller
from foregate.prefetch.precision import Guess
from foregate.types import ExpertKey, Moment, Prediction, StepStats

Absent = tuple[Guess, ExpertKey]
"""What is predicted and has no slot."""

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
        self._guesses: dict[ExpertKey, Guess] = {}
        self._predicted_at: dict[int, dict[int, float]] = {}
        self._waited_s = 0.0
        self._arrived_at: float | None = None

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
        self._arrived_at = None

    def consider(self, layer: int, moment: Moment, predictions: Sequence[Prediction]) -> None:
        """At ``moment`` of MoE layer ``layer``: submit what is predicted and absent, nearest layer first.

        Layers from L on are the next token's; what has been routed already, or lies a token or more away, is dropped.
        """
        self._reap()
        now = perf_counter() - self._waited_s
        self._tell_predictions(layer, moment, predictions)
        limit = self.controller.fixed
        width = _width(self._top_k, limit)
        first, layers = layer + (moment is Moment.AFTER_ROUTING), len(self._experts)
        absent: dict[int, list[Absent]] = {}
        for prediction in predictions if len(predictions) < 2 else sorted(predictions, key=_layer_of):
            if not first <= prediction.layer < first + layers:
                continue
            target, distance = prediction.layer % layers, prediction.layer - layer
            made = self._predicted_at.get(target)
            if made is None:
                self._predicted_at[target] = {distance: now}
            elif distance not in made:
                made[distance] = now
            ranked = _existing(prediction.experts, self._experts[target], 2 * width)
            self._withdraw(target, ranked)
            held = self._cache.held(target)
            # Of two predictions for one layer, the later one counts.
            absent[distance] = [
                (Guess(target, distance, rank), ExpertKey(target, expert))
                for rank, expert in enumerate(ranked[:width])
                if expert not in held
            ]
        found = [one for there in absent.values() for one in there]
        if not found:
            return
        if limit is not None:
            self._submit_limited(found, limit)
        else:
            self._submit_valued(found)

    def stream_ahead(self, layer: int) -> None:
        """Prefill: read the whole of ``layer`` ahead, as far as staging has room."""
        self._reap()
        if layer < len(self._experts) and self.may_stream:
            for expert in range(self._experts[layer]):
                if not self._submit(ExpertKey(layer, expert), None):
                    return

    def arrived(self, layer: int) -> None:
        """A decode step knows the routing of ``layer``: its window is over."""
        now, last = perf_counter() - self._waited_s, self._arrived_at
        self._arrived_at = now
        if last is not None and (layer or len(self._experts) == 1):  # between tokens is more than a layer
            self.controller.link.saw_layer(now - last)
        made = self._predicted_at.pop(layer, None)
        if made is not None:
            for distance, predicted in made.items():
                self.controller.saw_window(layer, distance, now - predicted)

    def saw_wait(self, seconds: float) -> None:
        """The model has waited for a read: demand has the link then, so that no window is wider for it. Windows are
        measured on a clock that stands still meanwhile."""
        self._waited_s += seconds

    def claim(self, key: ExpertKey) -> Ticket | None:
        """The ticket of a staged expert that is needed now, or None. One that is being cancelled is revived."""
        if self._dying or self.events.on:
            self._reap()
        ticket = self._tickets.pop(key, None)
        if ticket is None:
            ticket = self._dying.pop(key, None)
            if ticket is not None:
                self.stats.cancelled -= 1
                self._tell_fate(key, Fate.REVIVED)
        if ticket is not None:
            self.stats.used += 1
            self._judge(key, used=True, late=not ticket.ok)
            self._tell_fate(key, Fate.USED)
            if ticket.ok:
                self.tell_end(ticket)
        return ticket

    def expire(self, layer: int | None = None, but: Collection[ExpertKey] = ()) -> None:
        """Give up what is staged for ``layer`` (None: for any) and was not used, ``but`` what still will be."""
        if self._tickets:
            for key in [k for k in self._tickets if (layer is None or k.layer == layer) and k not in but]:
                self._give_up(key, self._tickets.pop(key))
        if self._dying or self.events.on:
            self._reap()

    def settle(self) -> None:
        """Wait until no cancelled read writes to a slot any more; one that hangs is left to the transfer's time-out."""
        deadline = perf_counter() + SETTLE_S
        while self._dying and perf_counter() < deadline:
            self._reap()
            sleep(1e-4)
        self._reap()

    def _submit_limited(self, absent: Sequence[Absent], limit: int) -> None:
        """At most ``limit`` reads a target layer, in the order of ``absent``."""
        left = dict.fromkeys((guess.layer for guess, _ in absent), limit)
        for guess, key in absent:
            if left[guess.layer] and not self._cache.holds(key):
                if not self._submit(key, guess):
                    return
                left[guess.layer] -= 1

    def _submit_valued(self, absent: Sequence[Absent]) -> None:
        """What is expected to save more than it costs, the most valuable first; experts weigh the same bytes."""
        controller = self.controller
        if controller.trusting:
            for guess, key in absent:
                if guess.rank < self._top_k and not self._submit(key, guess):
                    return
            return
        queued = before = sum([not ticket.done for ticket in self._tickets.values()])
        costs, odds = controller.costs(), controller.odds([guess for guess, _ in absent])
        values = [costs.worth(one, queued) for one in odds]
        for at in sorted(range(len(values)), key=values.__getitem__, reverse=True):
            guess, key = absent[at]
            value = values[at] if queued == before else costs.worth(odds[at], queued)
            if value <= 0 or controller.sated:
                controller.declined(guess)
            elif self._submit(key, guess):
                queued += 1
            else:
                return

    def _withdraw(self, target: int, ranked: Sequence[int]) -> None:
        """Cancel what an earlier prediction wanted of ``target``, this one does not, and is not read yet."""
        if not self._tickets:
            return
        gone = [
            key
            for key, ticket in self._tickets.items()
            if key.layer == target and key.expert not in ranked and not ticket.done
        ]
        for key in gone:
            self._give_up(key, self._tickets.pop(key))

    def _submit(self, key: ExpertKey, guess: Guess | None) -> bool:
        """Read ``key`` ahead unless it is there already; False when staging is full."""
        if not self._cache.staging_room:
            return False
        if self._cache.holds(key):
            return True
        slot = self._cache.stage(key)
        if slot is None:
            return False
        self._tickets[key] = self._transfer.submit(key, slot, speculative=True)
        if self.events.on:
            self.events.emit(ReadSubmitted(perf_counter_ns(), key, True))
        self.stats.issued += 1
        if guess is not None:
            self._guesses[key] = guess
            self.controller.issued(guess)
        return True

    def _give_up(self, key: ExpertKey, ticket: Ticket) -> None:
        self._judge(key, used=False)
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

    def _judge(self, key: ExpertKey, *, used: bool, late: bool = False) -> None:
        guess = self._guesses.pop(key, None)
        if guess is not None:
            self.controller.judge(guess, used=used, late=late)

    def _reap(self) -> None:
        if self.events.on:
            self._tell_arrivals()
        if self._dying:
            for key in [k for k, ticket in self._dying.items() if ticket.done]:
                self._let_go(key, self._dying.pop(key))

    def _let_go(self, key: ExpertKey, ticket: Ticket) -> None:
        """Free the slot; where every expert fits, what was read for nothing now stays for later."""
        if ticket.ok and self._cache.has_room_for_all(sum(self._experts)):
            self._cache.adopt(key)
        else:
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


def depth(top_k: int, limit: int | None) -> int:
    """How many experts of a ranking are looked at, with at most ``limit`` reads a layer or None."""
    return 2 * _width(top_k, limit)


def _width(top_k: int, limit: int | None) -> int:
    return limit or top_k + max(1, top_k // 2)


def _layer_of(prediction: Prediction) -> int:
    return prediction.layer


def _existing(named: Iterable[int], experts: int, most: int) -> list[int]:
    """The first ``most`` of ``named`` that are experts of a layer of ``experts``."""
    if type(named) is tuple:
        head = named[:most]
        found = [e for e in head if type(e) is int and 0 <= e < experts]
        if len(found) == len(head):
            return found
    return list(islice((int(e) for e in named if _is_expert(e, experts)), most))


def _is_expert(value: object, experts: int) -> bool:
    """Predictors are strangers' code: what they name may not exist."""
    return isinstance(value, (int, np.integer)) and bool(0 <= value < experts)
