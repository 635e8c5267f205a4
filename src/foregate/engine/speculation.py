"""The predictor is asked, and what it tells goes to the prefetcher. Whatever a stranger's predictor does, the text
comes out as without it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import index as index_of
from time import perf_counter
from typing import Any, TypeVar

from foregate.engine.signals import ModelSignals
from foregate.events import Part, TimeSpent, ns
from foregate.interfaces import Predictor
from foregate.native.kernels import helped_s
from foregate.prefetch.prefetcher import Prefetcher
from foregate.types import Moment, Phase, Prediction, RoutingStep

log = logging.getLogger("foregate")
T = TypeVar("T")


class Speculation:
    """The part of a runtime that speculates. ``phase`` is set before each forward."""

    def __init__(self, predictor: Predictor, prefetcher: Prefetcher, signals: ModelSignals) -> None:
        self.phase = Phase.PREFILL
        self.predictor = predictor
        self._prefetcher = prefetcher
        self._events = prefetcher.events
        self._signals = signals
        self._beginning: Callable[[ModelSignals], Callable[[], Sequence[Prediction]]] | None = None
        self._begun: Callable[[], Sequence[Prediction]] | None = None
        """How the predictor begins, and what tells the predictions that are being computed, if any."""

    def _observe(self, step: RoutingStep) -> None:
        self._tried(self.predictor.observe, step)

    def _ask_at(self, layer: int, moment: Moment) -> None:
        if self.predictor.moment is moment:
            self._predict(layer, moment)

    def _begin_predicting(self, layer: int) -> None:
        """A predictor that can compute beside does so while the engine has this layer's experts computed."""
        if self._beginning is None or not self._asks():
            return
        began = perf_counter()
        self._begun = self._asked(layer, Moment.AFTER_ROUTING, self._beginning, self._signals)
        self._tell_prediction(began, layer)

    def _predict(self, layer: int, moment: Moment) -> None:
        """The predictor is asked at ``moment`` of ``layer``, and believed as far as it pays."""
        if self.predictor.moment is not moment or self.phase is Phase.PREFILL:
            return
        begun, self._begun = self._begun, None
        if begun is None and not self._asks():
            return
        began = perf_counter()
        ask, given = (self.predictor.predict, (self._signals,)) if begun is None else (begun, ())
        predictions = self._asked(layer, moment, _told, ask, *given)
        if begun is not None:
            began = min(perf_counter(), began + helped_s())
        if predictions is not None and self._prefetcher.wanted:
            self._prefetcher.consider(layer, moment, predictions)
        self._tell_prediction(began, layer)

    def _asks(self) -> bool:
        """Whether the predictor is to be asked."""
        return self._prefetcher.wanted > 0 or self._prefetcher.controller.rehearsing

    def _asked(self, layer: int, moment: Moment, ask: Callable[..., T], *given: Any) -> T | None:
        """What ``ask`` tells there; None if it fails."""
        self._signals.layer, self._signals.moment = layer, moment
        return self._tried(ask, *given)

    def _tried(self, call: Callable[..., T], *given: Any) -> T | None:
        """What a predictor's ``call`` gives; None if it fails, which ends speculation."""
        try:
            return call(*given)
        except Exception as error:  # a stranger's predictor must not decide whether the text comes out
            self.give_up_predicting(f"predictor {self.predictor.name!r} failed: {type(error).__name__}: {error}")
            return None

    def _tell_prediction(self, began: float, layer: int) -> None:
        ended = perf_counter()
        self._prefetcher.stats.predict_s += ended - began
        self._prefetcher.controller.saw_prediction(ended - began)
        if self._events.on:
            self._events.emit(TimeSpent(ns(began), ns(ended), Part.PREDICT, layer))

    def drop_begun(self) -> None:
        """Nobody wants to know any more; what is being computed reads memory that is about to change."""
        begun, self._begun = self._begun, None
        if begun is not None:
            with suppress(Exception):
                begun()

    def give_up_predicting(self, reason: str) -> None:
        """No speculation from now on, and say why, once."""
        if not self._prefetcher.controller.off_reason:
            self._prefetcher.controller.switch_off(reason)
            log.warning("speculation is off: %s", reason)


def _told(ask: Callable[..., Sequence[Prediction]], *given: ModelSignals) -> list[Prediction]:
    """What ``ask`` tells, in the form that it promises: strangers may give anything that can be read as that."""
    return [
        p if type(p) is Prediction and type(p.layer) is int and type(p.experts) is tuple else _read(p)
        for p in ask(*given)
    ]


def _read(p: Prediction) -> Prediction:
    return Prediction(index_of(p.layer), tuple(p.experts), tuple(p.scores))
