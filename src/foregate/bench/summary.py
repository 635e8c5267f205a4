"""From runs to figures: medians with ranges for every arm, and the ratios that claims are made of. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from foregate.bench.arms import BASELINE, RESIDENT
from foregate.bench.session import Outcome

PREFETCH, ORACLE = "cache+prefetch", "oracle@"


def summarise(outcome: Outcome, limits: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of every arm of ``outcome`` by name, with ``ratios`` beside: see docs/bench.md for each of them."""
    names = list(dict.fromkeys(run["arm"] for run in outcome.runs))
    arms = {name: _arm([run for run in outcome.runs if run["arm"] == name], outcome.dense_s) for name in names}
    contention = float(limits.get("contention", 1.0))
    for arm in arms.values():
        bound = max(arm["compute_ms"] * contention, arm["io_ms"])
        arm["distance_to_bound"] = arm["tpot_ms"]["median"] / bound if bound else None
    best = best_cache_only(arms)
    for name, arm in arms.items():
        arm["oracle_gain"] = _gain(arms, best, name)
    return {
        "budget": outcome.setting.budget,
        "throttle_bps": outcome.setting.throttle_bps,
        "limit_bytes": outcome.limit_bytes,
        "peak_bytes": outcome.peak_bytes,
        "dense_ms": outcome.dense_s * 1e3,
        "best_cache_only": best,
        "outputs_identical": identical(outcome.runs),
        "arms": arms,
        "ratios": ratios(arms, outcome.runs, best),
    }


def best_cache_only(arms: Mapping[str, Any]) -> str | None:
    """The fastest arm with a cache and without prefetch: what prefetch is judged against."""
    found = [name for name in arms if name.startswith(f"{BASELINE}:")]
    return min(found, key=lambda name: arms[name]["tpot_ms"]["median"], default=None)


def identical(runs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every arm gave the same tokens for the same prompt."""
    seen: dict[str, list[int]] = {}
    return all(seen.setdefault(run["prompt"], run["report"]["token_ids"]) == run["report"]["token_ids"] for run in runs)


def ratios(arms: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], best: str | None) -> dict[str, Any]:
    """How many times faster: TPOT of the second name over TPOT of the first, over paired runs: median and range."""
    found = {}
    subjects = [name for name in arms if name.startswith((PREFETCH, ORACLE))]
    for name in subjects:
        for other in [best, "on-demand-sequential", "on-demand-parallel"]:
            if other in arms:
                found[f"{name} vs {other}"] = paired(runs, name, str(other))
    if best and RESIDENT in arms:
        found[f"{best} vs {RESIDENT}"] = paired(runs, best, RESIDENT)
    return found


def paired(runs: Sequence[Mapping[str, Any]], name: str, other: str) -> dict[str, float]:
    """TPOT of ``other`` over TPOT of ``name``, each round and prompt on its own: above 1, ``name`` is faster."""
    mine, theirs = _by_round(runs, name), _by_round(runs, other)
    values = [theirs[key] / mine[key] for key in mine if key in theirs]
    return {"median": median(values), "min": min(values), "max": max(values), "pairs": len(values)}


def _by_round(runs: Sequence[Mapping[str, Any]], name: str) -> dict[tuple[str, int], float]:
    return {(run["prompt"], run["round"]): float(np.mean(run["step_s"])) for run in runs if run["arm"] == name}


def _arm(runs: Sequence[Mapping[str, Any]], dense_s: float) -> dict[str, Any]:
    """One arm over its runs. TPOT of a run is the mean over its tokens; ``p95`` is over all tokens."""
    means = [float(np.mean(run["step_s"])) * 1e3 for run in runs]
    steps = np.concatenate([run["step_s"] for run in runs]) * 1e3
    decode = [run["report"]["decode"] for run in runs]
    per_token = {name: _mean(decode, name) for name in PER_TOKEN}
    compute_ms = per_token["expert_compute_s_per_token"] * 1e3 + dense_s * 1e3
    stall_ms = per_token["stall_s_per_token"] * 1e3
    tpot = median(means)
    hits, misses = (sum(d[name] for d in decode) for name in ("hits", "misses"))
    read = sum(d["read_bytes"]["demand"] + d["read_bytes"]["prefetch"] for d in decode)
    fates = {name: sum(run["report"]["prefetch"][name] for run in runs) for name in runs[0]["report"]["prefetch"]}
    needed = misses + fates["used"] - fates["late"]
    slot = runs[0]["report"]["budget_bytes"] / max(1, runs[0]["report"]["slots"])
    last = runs[-1]["report"]
    return {
        "tpot_ms": {"median": tpot, "min": min(means), "max": max(means), "p95": float(np.percentile(steps, 95))},
        "ttft_s": median(run["report"]["ttft_s"] for run in runs),
        "hit": hits / (hits + misses) if hits + misses else 1.0,
        "read_mb_per_token": per_token["read_bytes_per_token"] / 1e6,
        "compute_ms": compute_ms,
        "expert_ms": per_token["expert_compute_s_per_token"] * 1e3,
        "io_ms": per_token["io_s_per_token"] * 1e3,
        "exposed_io_ms": stall_ms,
        "stall_ms": {
            "demand": per_token["demand_stall_s_per_token"] * 1e3,
            "late_prefetch": per_token["late_stall_s_per_token"] * 1e3,
        },
        "overlap": 1 - stall_ms / (per_token["io_s_per_token"] * 1e3) if per_token["io_s_per_token"] else 1.0,
        "overhead_ms": tpot - compute_ms - stall_ms,
        "predict_ms": per_token["predict_s_per_token"] * 1e3,
        "amplification": read / (needed * slot) if needed else None,
        "prefetch": fates,
        "late": fates["late"] / fates["used"] if fates["used"] else 0.0,
        "wasted": fates["wasted"] / fates["issued"] if fates["issued"] else 0.0,
        "controller": last["controller"],
        "runs": len(runs),
    }


PER_TOKEN = (
    "expert_compute_s_per_token",
    "stall_s_per_token",
    "demand_stall_s_per_token",
    "late_stall_s_per_token",
    "io_s_per_token",
    "read_bytes_per_token",
    "predict_s_per_token",
)


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(float(row[name]) for row in rows) / len(rows)


def _gain(arms: Mapping[str, Any], best: str | None, name: str) -> float | None:
    """Share of the stall that the best oracle saves, against the best cache-only arm, that ``name`` saves."""
    oracles = [arm["exposed_io_ms"] for other, arm in arms.items() if other.startswith(ORACLE)]
    if best is None or not oracles or not name.startswith((PREFETCH, ORACLE)):
        return None
    possible = arms[best]["exposed_io_ms"] - min(oracles)
    return (arms[best]["exposed_io_ms"] - arms[name]["exposed_io_ms"]) / possible if possible > 0 else None
