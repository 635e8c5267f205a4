"""A predictor asked about recorded prompts, as the engine asks it: what it ranked, how many layers ahead, how fast.

Shapes: T decode tokens of a prompt, L MoE layers, E experts of the widest layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.prompt import Shape
from foregate.errors import ConfigError, ForegateError
from foregate.evaluation.held_out import HeldPrompt
from foregate.evaluation.trace_signals import TraceSignals
from foregate.interfaces import Predictor
from foregate.predictors.oracle import Oracle, RouteRecorder
from foregate.sim.replay import Forecast
from foregate.types import Moment, Phase, Prediction, RoutingStep

NOTHING = -1
"""Fills up a ranking that does not name every expert."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Of one prompt: ``ranks[lead]`` [T, L, E] int16, the ranking of the experts that MoE layer l of token t needs,
    made ``lead`` layers before; ``NOTHING`` where none was made."""

    moment: Moment
    ranks: dict[int, NDArray[np.int16]]

    @property
    def forecast(self) -> Forecast:
        """As the simulator takes it."""
        return Forecast(self.moment, self.ranks)

    def nearest(self, like: NDArray[np.int16]) -> NDArray[np.int16]:
        """The ranking with the smallest lead for every layer and token; shaped as ``like`` [T, L, E]."""
        out = np.full_like(like, NOTHING)
        for lead in sorted(self.ranks, reverse=True):
            made = self.ranks[lead][:, :, :1] != NOTHING
            out = np.where(made, self.ranks[lead], out)
        return out


def ask(predictor: Predictor, signals: TraceSignals, prompt: HeldPrompt, shape: Shape) -> Answers:
    """Everything that ``predictor`` says about ``prompt``. Raises ConfigError where it cannot be asked, naming it."""
    try:
        return _ask(predictor, signals, prompt, shape)
    except ForegateError:
        raise
    except Exception as error:  # a stranger's predictor, which may break in any way
        raise ConfigError(f"predictor {predictor.name!r} failed: {type(error).__name__}: {error}") from error


def _ask(predictor: Predictor, signals: TraceSignals, prompt: HeldPrompt, shape: Shape) -> Answers:
    ranks: dict[int, NDArray[np.int16]] = {}
    _begin(predictor, signals, prompt, shape)
    for token in range(prompt.tokens):
        for layer in range(shape.layers):
            for moment in Moment:
                if moment is Moment.AFTER_ROUTING:
                    predictor.observe(prompt.decode_step(token, layer, shape.top_k[layer]))
                if moment is predictor.moment:
                    signals.at(token, layer, moment)
                    _keep(predictor.predict(signals), ranks, token, layer, moment, prompt.tokens, shape)
    return Answers(predictor.moment, ranks)


def _begin(predictor: Predictor, signals: TraceSignals, prompt: HeldPrompt, shape: Shape) -> None:
    signals.begin(prompt)
    if isinstance(predictor, Oracle):
        predictor.load(recording(prompt, shape), prompt)
    predictor.reset()
    if len(prompt.prefill):
        for layer in range(shape.layers):
            predictor.observe(prompt.prompt_step(layer, shape.top_k[layer]))


def _keep(
    predictions: Sequence[Prediction],
    ranks: dict[int, NDArray[np.int16]],
    token: int,
    layer: int,
    moment: Moment,
    tokens: int,
    shape: Shape,
) -> None:
    """Note what the engine would act on: a layer that is not routed yet, less than a token away, of this answer."""
    first = layer + (moment is Moment.AFTER_ROUTING)
    for prediction in predictions:
        target = prediction.layer % shape.layers
        there = token + prediction.layer // shape.layers
        if first <= prediction.layer < first + shape.layers and there < tokens:
            lead = prediction.layer - layer
            if lead not in ranks:
                ranks[lead] = np.full((tokens, shape.layers, shape.experts), NOTHING, np.int16)
            size = shape.experts_per_layer[target]
            named = [e for e in dict.fromkeys(map(int, prediction.experts)) if 0 <= e < size]
            ranks[lead][there, target, : len(named)] = named


def recording(prompt: HeldPrompt, shape: Shape) -> RouteRecorder:
    """``prompt`` as a recording of the same run, for the controls that replay one."""
    recorder = RouteRecorder()
    for token in range(prompt.tokens):
        for layer in range(shape.layers):
            recorder.on_route(prompt.decode_step(token, layer, shape.top_k[layer]))
    return recorder


def seconds_per_token(
    predictor: Predictor, signals: TraceSignals, prompt: HeldPrompt, shape: Shape, *, tokens: int = 24, rounds: int = 3
) -> float:
    """Wall seconds that observing and predicting take for one decode token, all layers: the fastest of ``rounds``.

    ``signals`` must not be batched, or routers would seem to cost nothing.
    """
    best = float("inf")
    few = min(tokens, prompt.tokens)
    for _ in range(rounds):
        _begin(predictor, signals, prompt, shape)
        spent = 0.0
        for token in range(few):
            steps: list[RoutingStep] = [prompt.decode_step(token, n, shape.top_k[n]) for n in range(shape.layers)]
            for layer, step in enumerate(steps):
                signals.at(token, layer, predictor.moment)
                began = perf_counter()
                if predictor.moment is Moment.AFTER_ROUTING:
                    predictor.observe(step)
                    predictor.predict(signals)
                else:
                    predictor.predict(signals)
                    predictor.observe(step)
                spent += perf_counter() - began
        best = min(best, spent / few)
    assert steps[0].phase is Phase.DECODE
    return best
