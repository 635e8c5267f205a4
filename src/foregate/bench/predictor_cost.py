"""What a predictor takes inside the engine: microseconds of every call, beside what the layers themselves take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter, thread_time
from typing import Any, TypeVar

import numpy as np

from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.errors import ConfigError
from foregate.interfaces import Predictor, Signals
from foregate.native.kernels import helped_s
from foregate.predictors.choice import beginning
from foregate.types import Phase, Prediction, RoutingStep

PROMPT_TOKENS = 32

T = TypeVar("T")
Spent = tuple[float, float]


class Timed:
    """``predictor``, with the seconds of every decode call noted: on the clock, and of this thread's CPU.

    One that can begin early does so in every other token; in the others it computes alone, for comparison.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.name, self.signal, self.moment = predictor.name, predictor.signal, predictor.moment
        self.lookahead, self.asks_routers = predictor.lookahead, predictor.asks_routers
        self.asked: list[Spent] = []
        self.alone: list[Spent] = []
        self.told: list[Spent] = []
        self._predictor = predictor
        self.cost, self.reset = predictor.cost, predictor.reset
        self._early = beginning(predictor)

    def observe(self, step: RoutingStep) -> None:
        _, spent = _timed(self._predictor.observe, step)
        if step.phase is Phase.DECODE:
            self.told.append(spent)

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        predictions, spent = _timed(self._predictor.predict, signals)
        self.asked.append(spent)
        return predictions

    def begin(self, signals: Signals) -> Callable[[], Sequence[Prediction]]:
        """See ``interfaces.Beginner``."""
        if self._early is None:
            return partial(self.predict, signals)
        if signals.position % 2:
            return partial(self._predict_alone, signals)
        end, spent = _timed(self._early, signals)
        return partial(self._end, end, spent)

    def _predict_alone(self, signals: Signals) -> Sequence[Prediction]:
        predictions, spent = _timed(self._predictor.predict, signals)
        self.alone.append(spent)
        return predictions

    def _end(self, end: Callable[[], Sequence[Prediction]], before: Spent) -> Sequence[Prediction]:
        predictions, after = _timed(end)
        helped = helped_s()  # is not the predictor's
        self.asked.append((before[0] + after[0] - helped, before[1] + after[1] - helped))
        return predictions


def _timed(call: Callable[..., T], *given: Any) -> tuple[T, Spent]:
    cpu, began = thread_time(), perf_counter()  # what is asked of the system stays out of what the clock measures
    answer = call(*given)
    ended = perf_counter()
    return answer, (ended - began, thread_time() - cpu)


def measure(config: RunConfig, tokens: int, seed: int = 0) -> dict[str, Any]:
    """Decode ``tokens`` tokens after a seeded prompt with ``config``'s predictor, asked at every layer.

    Medians in microseconds: ``predict_us`` and ``observe_us`` of a call, ``us_per_token`` of all layers and
    ``cpu_us_per_token`` of this thread; ``layer_us`` of a layer without what it waited for reads, ``share`` of it that
    the predictor takes; both again with the waits of this budget and disk (``waiting_layer_us``, ``waiting_share``).
    Of a predictor that another thread computes while experts are looked up (``interfaces.Beginner``) all this is what
    the engine's own thread spends or waits; ``alone_us`` is a call that it makes alone, else None.
    Raises ConfigError where it is never asked.
    """
    with Engine(config) as engine:
        timed = engine.runtime.predictor = Timed(engine.predictor)
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, engine.spec.vocab_size, PROMPT_TOKENS).tolist()
        steps = list(engine.stream(ids, SamplingConfig(max_new_tokens=tokens + 1)))[1:]
        if not (timed.asked or timed.alone):
            reason = engine.prefetcher.controller.decision.reason
            raise ConfigError(f"predictor {timed.name!r} was never asked: {reason or 'the budget holds every expert'}")
        layers = engine.spec.layers
        cost = engine.predictor.cost()
    busy = [(step.stats.wall_s - step.stats.stall_s) / layers for step in steps]
    waiting = median(step.stats.wall_s for step in steps) / layers
    predict, observe = (median(wall for wall, _ in calls) for calls in (timed.asked or timed.alone, timed.told))
    cpu = median(cpu for _, cpu in timed.asked or timed.alone) + median(cpu for _, cpu in timed.told)
    return {
        "predictor": config.predictor,
        "model": config.model,
        "lookahead": timed.lookahead,
        "tokens": len(steps),
        "layers": layers,
        "predict_us": predict * 1e6,
        "alone_us": median(wall for wall, _ in timed.alone) * 1e6 if timed.alone else None,
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
