"""What a predictor takes inside the engine: microseconds of every call, beside what the layers themselves take."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import numpy as np

from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.errors import ConfigError
from foregate.interfaces import Predictor, Signals
from foregate.types import Phase, Prediction, RoutingStep

PROMPT_TOKENS = 32


class Timed:
    """``predictor``, with the seconds of every decode call noted: on the clock, and of this thread's CPU."""

    def __init__(self, predictor: Predictor) -> None:
        self.name, self.signal, self.moment = predictor.name, predictor.signal, predictor.moment
        self.lookahead, self.asks_routers = predictor.lookahead, predictor.asks_routers
        self.asked: list[tuple[float, float]] = []
        self.told: list[tuple[float, float]] = []
        self._predictor = predictor
        self.cost, self.reset = predictor.cost, predictor.reset

    def observe(self, step: RoutingStep) -> None:
        cpu, began = thread_time(), perf_counter()  # what is asked of the system stays out of what the clock measures
        self._predictor.observe(step)
        ended = perf_counter()
        if step.phase is Phase.DECODE:
            self.told.append((ended - began, thread_time() - cpu))

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        cpu, began = thread_time(), perf_counter()
        predictions = self._predictor.predict(signals)
        ended = perf_counter()
        self.asked.append((ended - began, thread_time() - cpu))
        return predictions


def measure(config: RunConfig, tokens: int, seed: int = 0) -> dict[str, Any]:
    """Decode ``tokens`` tokens after a seeded prompt with ``config``'s predictor, asked at every layer.

    Medians in microseconds: ``predict_us`` and ``observe_us`` of a call, ``us_per_token`` of all layers and
    ``cpu_us_per_token`` of this thread; ``layer_us`` of a layer without what it waited for reads, ``share`` of it that
    the predictor takes; both again with the waits of this budget and disk (``waiting_layer_us``, ``waiting_share``).
    Raises ConfigError where it is never asked.
    """
    with Engine(config) as engine:
        timed = engine.runtime.predictor = Timed(engine.predictor)
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, engine.spec.vocab_size, PROMPT_TOKENS).tolist()
        steps = list(engine.stream(ids, SamplingConfig(max_new_tokens=tokens + 1)))[1:]
        if not timed.asked:
            reason = engine.prefetcher.controller.decision.reason
            raise ConfigError(f"predictor {timed.name!r} was never asked: {reason or 'the budget holds every expert'}")
        layers = engine.spec.layers
        cost = engine.predictor.cost()
    busy = [(step.stats.wall_s - step.stats.stall_s) / layers for step in steps]
    waiting = median(step.stats.wall_s for step in steps) / layers
    predict, observe = (median(wall for wall, _ in calls) for calls in (timed.asked, timed.told))
    cpu = median(cpu for _, cpu in timed.asked) + median(cpu for _, cpu in timed.told)
    return {
        "predictor": config.predictor,
        "model": config.model,
        "lookahead": timed.lookahead,
        "tokens": len(steps),
        "layers": layers,
        "predict_us": predict * 1e6,
        "observe_us": observe * 1e6,
        "us_per_token": (predict + observe) * layers * 1e6,
        "cpu_us_per_token": cpu * layers * 1e6,
        "layer_us": median(busy) * 1e6,
        "share": (predict + observe) / median(busy),
        "waiting_layer_us": waiting * 1e6,
        "waiting_share": (predict + observe) / waiting,
        "flops": cost.flops,
        "bytes": cost.nbytes,
        "parameters": cost.parameters,
    }
