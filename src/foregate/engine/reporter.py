"""Keeps the report of one run while it runs: the facts at its start, its steps, the peaks and fates at its end."""

from __future__ import annotations

from copy import copy
from dataclasses import asdict
from time import perf_counter, perf_counter_ns
from typing import TYPE_CHECKING

from foregate.engine.memory import rss_peak
from foregate.engine.meter import Meter
from foregate.engine.report import RunReport
from foregate.events import TokenMade, ns
from foregate.types import FinishReason, GenerationStep, Phase, StepStats

if TYPE_CHECKING:
    from foregate.engine.engine import Engine


class Reporter:
    """``report`` fills with every ``step`` and is whole after ``close``. ``cold``: the cache is empty now."""

    def __init__(self, engine: Engine, meter: Meter, *, prompt_tokens: int, cold: bool) -> None:
        self.report = _opened(engine, prompt_tokens, cold)
        self._engine = engine
        self._meter = meter
        self._departed = copy(engine.deviation)
        meter.lap()

    def step(
        self, token: int, text: str, phase: Phase, began: float, finish: FinishReason | None, stats: StepStats
    ) -> GenerationStep:
        """The step that ends now; ``stats``: the meter's lap. ``began``: ``perf_counter`` at its start."""
        # The consumer's own time between steps is not the engine's.
        stats.wall_s = perf_counter() - began
        step = GenerationStep(len(self.report.steps), token, text, phase, stats, finish)
        self.report.steps.append(step)
        if self._engine.events.on:
            self._engine.events.emit(TokenMade(ns(began), perf_counter_ns(), step))
        return step

    def close(self) -> None:
        """Add what is known at the end only."""
        self._add_leftovers()
        engine, report = self._engine, self.report
        controller = engine.prefetcher.controller
        report.controller = {**asdict(controller.decision), "switches": controller.switches}
        report.ledger = controller.account().as_dict()
        report.resident_bytes_peak = engine.pool.peak_bytes
        report.rss_peak_bytes = rss_peak()
        report.direct_io = engine.store.direct_io
        report.advised, report.advice_fault = engine.runtime.advised, engine.runtime.advice_fault
        deviation = engine.deviation
        if deviation is not None and self._departed is not None:
            report.lossy = {"mode": engine.config.lossy, **deviation.since(self._departed).as_dict()}

    def _add_leftovers(self) -> None:
        """What was cancelled after an early end belongs to the last step; its time does not."""
        rest = self._meter.lap()
        if self.report.steps:
            rest.wall_s = 0.0
            self.report.steps[-1].stats.add(rest)


def _opened(engine: Engine, prompt_tokens: int, cold: bool) -> RunReport:
    config, plan, spec = engine.config, engine.plan, engine.spec
    return RunReport(
        model=config.model,
        predictor=config.predictor,
        prefetch=config.prefetch,
        lookahead=engine.predictor.lookahead,
        cache_policy=config.cache_policy,
        store="packed" if engine.checkpoint.packed else "direct",
        direct_io=engine.store.direct_io,
        cold=cold,
        prompt_tokens=prompt_tokens,
        budget_bytes=plan.budget_bytes,
        slots=plan.slots,
        experts=spec.experts,
        dense_bytes=spec.dense_bytes,
        load_s=engine.load_s,
        products_timed=engine.dense.timed,
        staging_slots=engine.staging.slots,
        overhead_bytes=engine.overhead_bytes,
        readers=engine.readers.as_dict(),
    )
