"""From counts to the result: one JSON object, rates from 0 to 1, with what it is a result of."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from foregate import __version__
from foregate.evaluation.bootstrap import Bootstrap
from foregate.evaluation.controls import check_controls
from foregate.evaluation.judge import Array, Bench, Judged
from foregate.evaluation.settings import POLICY, percent
from foregate.training.dataset import FRACTIONS, SPLIT_SEED

MAIN = ("recall_at_k", "exact_set", "top1", "at_least_half", "jaccard")


def result(bench: Bench, judged: Mapping[str, Judged], left_out: Mapping[str, str]) -> dict[str, Any]:
    """The result as JSON takes it (docs/evaluate.md). Raises ControlError where a control is off."""
    settings = bench.settings
    draws = Bootstrap(len(bench.prompts), settings.bootstrap, settings.seed)
    controls = check_controls(judged, bench.shape, bench.reads, draws)
    writer = _Writer(bench, judged, draws)
    return {
        "predictors": {name: writer.predictor(one) for name, one in judged.items()},
        "trace": bench.held.hash,
        "model": bench.held.model.fingerprint,
        "commit": commit(),
        "about": _about(bench, left_out, controls),
    }


def commit() -> str:
    """Of the checkout that runs, ``-dirty`` if it was changed; the version where there is none."""
    here = Path(__file__).parent
    try:
        changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", "src")
        return _git(here, "rev-parse", "HEAD")[:12] + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"


def _git(here: Path, *arguments: str) -> str:
    top = here.parents[2]
    done = subprocess.run(["git", "-C", str(top), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


class _Writer:
    def __init__(self, bench: Bench, judged: Mapping[str, Judged], draws: Bootstrap) -> None:
        self._bench, self._draws = bench, draws
        self._none, self._oracle = judged["none"], judged["oracle"]
        self._domains = np.array(bench.domains)
        self._simulated = Bootstrap(bench.simulated, bench.settings.bootstrap, bench.settings.seed)
        policies = bench.settings.policies
        self._policy = POLICY if POLICY in policies else policies[0]

    def predictor(self, one: Judged) -> dict[str, Any]:
        """The entry of one predictor."""
        shares = self._bench.settings.residencies
        rates = {metric: self._rate(one, metric) for metric in one.metrics}
        gains = {percent(share): self._gain(one, (self._policy, share)) for share in shares}
        misses = {percent(share): self._covered(one, (self._policy, share)) for share in shares}
        return {
            **{metric: _number(rates[metric][0], 0.0) for metric in MAIN},
            "recall_on_misses": {key: _number(value[0]) for key, value in misses.items()},
            "oracle_gain": {key: _clipped(value[0]) for key, value in gains.items()},
            "us_per_token": round(one.us_per_token, 2),
            "parameters": one.parameters,
            "rank_alignment": _number(rates["rank_alignment"][0], 0.0),
            "recall_at": self._recall_at(one),
            "coverage": _number(float(one.made.sum()) / self._layers_in_all()),
            "expected_load_ms": self._expected_load(rates),
            "intervals": {
                **{metric: _interval(rates[metric]) for metric in MAIN},
                "recall_on_misses": {key: _interval(value) for key, value in misses.items()},
                "oracle_gain": {key: _interval(value) for key, value in gains.items()},
            },
            "by_layer": self._by_layer(one),
            "by_domain": self._by_domain(one),
            "by_lead": {str(lead): self._of_lead(one, table) for lead, table in sorted(one.by_lead.items())},
            "cache": {policy: self._cache(one, policy) for policy in self._bench.settings.policies},
            "flops": one.flops,
            **one.facts,
        }

    def _layers_in_all(self) -> int:
        return sum(prompt.tokens for prompt in self._bench.prompts) * self._bench.shape.layers

    def _rate(self, one: Judged, metric: str) -> tuple[float, float, float]:
        at = one.metrics.index(metric)
        return self._draws.ratio(one.sums[:, at].sum(axis=1), one.made.sum(axis=1))

    def _covered(self, one: Judged, cell: tuple[str, float]) -> tuple[float, float, float]:
        table = one.covered[cell].sum(axis=2)
        return self._draws.ratio(table[:, 0], table[:, 1])

    def _gain(self, one: Judged, cell: tuple[str, float]) -> tuple[float, float, float]:
        """Stall saved over what the oracle saves, both against the cache alone; NaN where the oracle saves nothing."""
        base, best = self._none.stalls[cell], self._oracle.stalls[cell]
        return self._simulated.ratio(base - one.stalls[cell], base - best)

    def _recall_at(self, one: Judged) -> dict[str, Any]:
        k = max(self._bench.shape.top_k)
        names = ["recall_at_k", *(f"recall_at_k+{extra}" for extra in range(1, k + 1))]
        return {str(k + extra): _number(self._rate(one, name)[0], 0.0) for extra, name in enumerate(names)}

    def _expected_load(self, rates: Mapping[str, tuple[float, float, float]]) -> dict[str, Any]:
        """(1 - accuracy) x load time of k experts, for both meanings of accuracy, milliseconds a layer."""
        whole = 1e3 * max(self._bench.shape.top_k) * self._bench.settings.device.read_s
        return {name: _number((1 - np.nan_to_num(rates[name][0])) * whole) for name in ("recall_at_k", "exact_set")}

    def _of_lead(self, one: Judged, table: Array) -> dict[str, Any]:
        total = table.sum(axis=0)
        return {name: _number(total[one.metrics.index(name)] / total[-1]) for name in (*MAIN, "rank_alignment")}

    def _by_layer(self, one: Judged) -> dict[str, list[Any]]:
        made = one.made.sum(axis=0)
        out = {}
        for metric in (*MAIN, "rank_alignment"):
            sums = one.sums[:, one.metrics.index(metric)].sum(axis=0)
            out[metric] = [_number(a / b) if b else None for a, b in zip(sums, made, strict=True)]
        share = min(self._bench.settings.residencies, key=lambda share: abs(share - 0.25))
        table = one.covered[(self._policy, share)].sum(axis=0)
        out["recall_on_misses"] = [_number(a / b) if b else None for a, b in zip(table[0], table[1], strict=True)]
        return out

    def _by_domain(self, one: Judged) -> dict[str, Any]:
        out = {}
        for domain in dict.fromkeys(self._bench.domains):
            mine = self._domains == domain
            made = one.made[mine].sum()
            rates = {m: _number(one.sums[mine, one.metrics.index(m)].sum() / made) if made else 0.0 for m in MAIN}
            misses = {}
            for share in self._bench.settings.residencies:
                table = one.covered[(self._policy, share)][mine].sum(axis=(0, 2))
                misses[percent(share)] = _number(_ratio(table[:1], table[1:2]))
            inside = mine[: self._bench.simulated]
            gains = {
                percent(share): self._domain_gain(one, (self._policy, share), inside)
                for share in self._bench.settings.residencies
            }
            out[domain] = {
                **rates,
                "recall_on_misses": misses,
                "oracle_gain": {key: _clipped(gain) for key, gain in gains.items()},
                "oracle_gain_signed": {key: _number(gain) for key, gain in gains.items()},
                "prompts": int(mine.sum()),
            }
        return out

    def _domain_gain(self, one: Judged, cell: tuple[str, float], inside: Any) -> float:
        base, best = self._none.stalls[cell][inside], self._oracle.stalls[cell][inside]
        return _ratio(base - one.stalls[cell][inside], base - best)

    def _cache(self, one: Judged, policy: str) -> dict[str, Any]:
        """Everything about one cache policy, by budget. Bytes are of the simulated device's experts."""
        nbytes = self._bench.settings.device.expert_bytes
        out = {}
        for share in self._bench.settings.residencies:
            cell = (policy, share)
            sim, table = one.sims[cell], one.covered[cell].sum(axis=(0, 2))
            out[percent(share)] = {
                "recall_on_misses": _number(_ratio(table[:1], table[1:2])),
                "reads_per_miss": _number(_ratio(table[2:3], table[1:2])),
                "simulated_recall_on_misses": _number(sim.recall_on_misses()),
                "oracle_gain": _number(self._gain(one, cell)[0]),
                "hits": sim.hits,
                "misses": sim.misses,
                "useful_bytes": (sim.used - sim.late) * nbytes,
                "late_bytes": sim.late * nbytes,
                "wasted_bytes": round(sim.wasted_s / self._bench.settings.device.read_s * nbytes),
                "read_amplification": _number(sim.busy_s / (sim.absent * self._bench.settings.device.read_s))
                if sim.absent
                else None,
                "stall_s": _number(sim.stall_s),
                "total_s": _number(sim.total_s),
            }
        return out


def _about(bench: Bench, left_out: Mapping[str, str], controls: list[str]) -> dict[str, Any]:
    settings, device = bench.settings, bench.settings.device
    domains = {d: sum(p.tokens for p in bench.prompts if p.domain == d) for d in dict.fromkeys(bench.domains)}
    return {
        "model_name": bench.held.model.name,
        "held_out": f"test side of the split by text, {'/'.join(f'{f:g}' for f in FRACTIONS)}, seed {SPLIT_SEED}",
        "prompts": len(bench.prompts),
        "prompts_in_traces": bench.held.prompts_in_all,
        "tokens": domains,
        "simulated_prompts": bench.simulated,
        "layers": bench.shape.layers,
        "top_k": max(bench.shape.top_k),
        "experts": bench.shape.experts,
        "reads_per_layer": bench.reads,
        "far_share": settings.far_share,
        "policy": POLICY if POLICY in settings.policies else settings.policies[0],
        "echo_sees": _echo_sees(bench),
        "device": {name: getattr(device, name) for name in device.__dataclass_fields__},
        "seed": settings.seed,
        "controls": controls,
        "left_out": dict(left_out),
    }


def _echo_sees(bench: Bench) -> str | None:
    if bench.worths is None:
        return None
    return "router scores" if bench.scored else "choices alone: not every trace has router scores (trace with --scores)"


def _ratio(above: Array, below: Array) -> float:
    total = float(np.sum(below))
    return float(np.sum(above)) / total if total > 0 else float("nan")


def _number(value: float, absent: float | None = None) -> float | None:
    """Six decimals; ``absent`` for NaN."""
    return absent if not np.isfinite(value) else round(float(value), 6)


def _clipped(value: float) -> float | None:
    return _number(min(1.0, max(0.0, value)) if np.isfinite(value) else value)


def _interval(value: tuple[float, float, float]) -> list[float | None]:
    return [_number(value[1]), _number(value[2])]
