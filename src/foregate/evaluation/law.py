"""The speed-up law S = 1/((1-f) + f/s) held against simulated time, over the bandwidth of the link.

f: share of time in stalls without prediction; s = 1/(1 - recall). The law knows neither bandwidth nor wasted reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from foregate.analysis.replay import Keys
from foregate.evaluation.asking import Answers, ask
from foregate.evaluation.judge import Bench
from foregate.evaluation.trace_signals import TraceSignals
from foregate.predictors.choice import make_predictor
from foregate.sim.device import Device
from foregate.sim.replay import Plan, SimResult, Simulation, decode_events

BANDWIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""GB/s."""


@dataclass(frozen=True, slots=True)
class LawRow:
    """One method on one link. ``read_amplification``: bytes read over bytes needed; ``ceiling``: (C+D)/max(C,D)."""

    predictor: str
    bandwidth: float
    stall_share: float
    recall: float
    law: float
    simulated: float
    read_amplification: float
    ceiling: float


def speed_up(stall_share: float, recall: float) -> float:
    """S of the law; s is infinite for recall 1."""
    return 1.0 / ((1.0 - stall_share) + stall_share * (1.0 - recall))


def law_rows(bench: Bench, names: Sequence[str], *, policy: str, share: float) -> list[LawRow]:
    """Every one of ``names`` at every bandwidth, on the prompts that ``bench`` simulates."""
    rows = []
    said = {name: _answers(bench, name) for name in names}
    for bandwidth in BANDWIDTHS:
        device = replace(bench.settings.device, bandwidth=bandwidth * 1e9)
        base = _simulate(bench, [], device, policy, share)
        stall = base.stall_s / base.total_s
        computing = base.total_s - base.stall_s
        for name in names:
            answers, recall = said[name]
            found = _simulate(bench, answers, device, policy, share)
            rows.append(
                LawRow(
                    predictor=name,
                    bandwidth=bandwidth,
                    stall_share=stall,
                    recall=recall,
                    law=speed_up(stall, recall),
                    simulated=base.total_s / found.total_s,
                    read_amplification=found.busy_s / (found.absent * device.read_s),
                    ceiling=(computing + base.busy_s) / max(computing, base.busy_s),
                )
            )
    return rows


def _answers(bench: Bench, name: str) -> tuple[list[Answers], float]:
    predictor = make_predictor(name, None, lambda: bench.held.identity)
    signals = TraceSignals(bench.shape, bench.routers)
    prompts = bench.prompts[: bench.simulated]
    answers = [ask(predictor, signals, prompt, bench.shape) for prompt in prompts]
    hit = total = 0.0
    for prompt, one in zip(prompts, answers, strict=True):
        for ranks in one.ranks.values():
            made = ranks[:, :, 0] >= 0
            first = ranks[:, :, : prompt.experts.shape[2]]
            found = (first[..., None] == prompt.experts[:, :, None, :]).any(axis=3) & (first >= 0)
            hit += float(found[made].sum())
            total += float(np.count_nonzero(prompt.experts[made] >= 0))
    return answers, hit / total if total else 0.0


def _simulate(bench: Bench, answers: Sequence[Answers], device: Device, policy: str, share: float) -> SimResult:
    prompts = bench.prompts[: bench.simulated]
    keys = Keys(bench.shape)
    future = [event for prompt in prompts for event in decode_events(keys, prompt.experts)]
    slots = int(bench.shape.total * share + 1e-9)
    simulation = Simulation(bench.shape, device, Plan(policy, slots, bench.reads), keys, future)
    for number, prompt in enumerate(prompts):
        simulation.prompt(prompt.experts, [answers[number].forecast] if answers else [])
    return simulation.result()
