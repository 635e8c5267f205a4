"""From runs to figures: medians with ranges for every arm, and the ratios that claims are made of. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from foregate.bench.arms import ADVICE, BASELINE, BEST, CONTROL, ORACLE, ORACLE_ALL, PREFETCH, RESIDENT, RIVAL
from foregate.bench.session import Outcome

Runs = Sequence[Mapping[str, Any]]


def summarise(outcome: Outcome, limits: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of every arm of ``outcome`` by name, with ``ratios`` beside: see docs/bench.md for each of them."""
    disk = disk_limit(limits, outcome.setting.throttle_bps)
    ours = [run for run in outcome.runs if "report" in run]
    arms = {name: _arm(runs, outcome.dense_s) for name, runs in _by_arm(ours).items()}
    compute_ms = min(arm["compute_ms"] for arm in arms.values())
    best = best_cache_only(arms)
    for name, arm in arms.items():
        arm |= bound(arm, compute_ms, disk)
        arm["warm"] = outcome.warm or name == RESIDENT
        arm["contention"] = outcome.watched.get(name)
        arm["expert_vs_resident"] = arm["expert_ms"] / arms[RESIDENT]["expert_ms"] if RESIDENT in arms else None
        arm["oracle_gain"] = oracle_gain(arms, best, name, ORACLE)
        arm["oracle_all_gain"] = oracle_gain(arms, best, name, ORACLE_ALL)
    arms |= {name: _rival_arm(runs) for name, runs in _by_arm(outcome.runs).items() if name.startswith(RIVAL)}
    for name, runs in _by_arm(outcome.runs).items():
        arms[name]["prompts"] = by_prompt(runs, disk)
    return {
        "budget": outcome.setting.budget,
        "throttle_bps": outcome.setting.throttle_bps,
        "warm": outcome.warm,
        "disk_limit_gb_per_s": disk,
        "limit_bytes": outcome.limit_bytes,
        "peak_bytes": outcome.peak_bytes,
        "uses": outcome.uses,
        "dense_ms": outcome.dense_s * 1e3,
        "compute_ms": compute_ms,
        "best_cache_only": best,
        "outputs_identical": identical(ours),
        "rivals_failed": outcome.rivals_failed,
        "arms": arms,
        "ratios": ratios(outcome.runs),
        "domains": _domains(outcome.runs),
    }


def disk_limit(limits: Mapping[str, Any], throttle_bps: int | None) -> float:
    """GB/s that the disk can give: the best that was measured, or the throttle where that is less."""
    best = float(limits["disk_gb_per_s_best"])
    return best if throttle_bps is None else min(best, throttle_bps / 1e9)


def bound(arm: Mapping[str, Any], compute_ms: float, disk: float) -> dict[str, Any]:
    """What a token of this arm must take at least: max(C, D), and TPOT over it.

    C is the compute of the arm in the cell that has least; D is what this arm reads at the disk's limit. What reading
    costs the arithmetic is not in it: ``contention`` says that for each arm.
    """
    at_least = max(compute_ms, arm["read_mb_per_token"] / disk)
    return {"bound_ms": at_least, "distance_to_bound": arm["tpot_ms"]["median"] / at_least if at_least else None}


def by_prompt(runs: Runs, disk: float) -> dict[str, Any]:
    """Each prompt of one arm: TTFT, TPOT, and the disk bandwidth of the prompt's pass as share of ``disk``."""
    found = {}
    for name in dict.fromkeys(run["prompt"] for run in runs):
        own = [run for run in runs if run["prompt"] == name]
        ttft_s = median(map(_ttft, own))
        gb_per_s = median(_prefill_bytes(run) / _ttft(run) / 1e9 for run in own)
        found[name] = {
            "ttft_s": ttft_s,
            "tpot_ms": median(float(np.mean(run["step_s"])) * 1e3 for run in own),
            "prefill_read_mb": median(_prefill_bytes(run) / 1e6 for run in own),
            "prefill_gb_per_s": gb_per_s,
            "prefill_disk_share": gb_per_s / disk,
        }
    return found


def _ttft(run: Mapping[str, Any]) -> float:
    return float(run["report" if "report" in run else "rival"]["ttft_s"])


def _prefill_bytes(run: Mapping[str, Any]) -> int:
    return int(run["report"]["prefill"]["read_bytes"] if "report" in run else run["rival"]["prefill_read_bytes"])


def _by_arm(runs: Runs) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        found.setdefault(run["arm"], []).append(run)
    return found


def domain(prompt: str) -> str:
    """The domain of a prompt's name."""
    return prompt.split("/", 1)[0]


def _domains(runs: Runs) -> dict[str, Any]:
    """Ratios of every domain on its own: a gain in one must not hide a loss in another."""
    names = dict.fromkeys(domain(run["prompt"]) for run in runs)
    return {name: ratios([run for run in runs if domain(run["prompt"]) == name]) for name in names}


def best_cache_only(arms: Mapping[str, Any]) -> str | None:
    """The fastest arm with a cache and without prefetch: what prefetch is judged against."""
    found = [name for name in arms if name.startswith(f"{BASELINE}:")]
    return min(found, key=lambda name: arms[name]["tpot_ms"]["median"], default=None)


def identical(runs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every arm gave the same tokens for the same prompt."""
    seen: dict[str, list[int]] = {}
    return all(seen.setdefault(run["prompt"], run["report"]["token_ids"]) == run["report"]["token_ids"] for run in runs)


def ratios(runs: Runs) -> dict[str, Any]:
    """How many times faster the first name is: TPOT of the second over TPOT of the first, over paired runs.

    A name with ``(TTFT)`` is about the time to the first token. ``BEST`` is the cache-only arm that was fastest in
    these very runs (``against``), which is harder on us than any policy chosen beforehand; each policy stands beside.
    """
    arms = {name: {"tpot_ms": {"median": median(_means(own))}} for name, own in _by_arm(runs).items()}
    best = best_cache_only(arms)
    policies = [name for name in arms if name.startswith(f"{BASELINE}:")]
    whole = [name for name in arms if name.startswith(RIVAL) and name.endswith(RESIDENT)]
    limited = [name for name in arms if name.startswith(RIVAL) and name not in whole]
    found: dict[str, Any] = {}

    def compare(name: str, other: str) -> None:
        if name in arms and other in arms:
            found[f"{name} vs {other}"] = paired(runs, name, other)
            if other.startswith(RIVAL) and not name.startswith((ORACLE, ORACLE_ALL)):
                found[f"{name} vs {other} (TTFT)"] = paired(runs, name, other, _ttft)

    # a rival that is only there at its full size is so in a cell that holds everything, as our arms then do
    peers = limited or whole
    for name in (name for name in arms if name.startswith(CONTROL)):
        compare(name, f"{BASELINE}:{name.removeprefix(CONTROL)}")
    for name in (name for name in arms if name.startswith((PREFETCH, ADVICE, ORACLE, ORACLE_ALL))):
        if best is not None:
            found[f"{name} vs {BEST}"] = {"against": best, **paired(runs, name, best)}
        for other in (*(policies if name.startswith(PREFETCH) else ()), *ON_DEMAND, *peers):
            compare(name, other)
    for other in (RESIDENT, *peers) if best is not None else ():
        compare(best or "", other)
    for name in whole:
        compare(RESIDENT, name)
    return found


ON_DEMAND = ("on-demand-sequential", "on-demand-parallel")


def _mean_step(run: Mapping[str, Any]) -> float:
    return float(np.mean(run["step_s"]))


def _means(runs: Runs) -> list[float]:
    return [_mean_step(run) * 1e3 for run in runs]


def paired(
    runs: Runs, name: str, other: str, seconds: Callable[[Mapping[str, Any]], float] = _mean_step
) -> dict[str, float]:
    """Seconds of ``other`` over those of ``name``, each round and prompt on its own: above 1, ``name`` is faster."""
    mine, theirs = _by_round(runs, name, seconds), _by_round(runs, other, seconds)
    values = [theirs[key] / mine[key] for key in mine if key in theirs]
    return {"median": median(values), "min": min(values), "max": max(values), "pairs": len(values)}


def _by_round(runs: Runs, name: str, seconds: Callable[[Mapping[str, Any]], float]) -> dict[tuple[str, int], float]:
    return {(run["prompt"], run["round"]): seconds(run) for run in runs if run["arm"] == name}


def _rival_arm(runs: Runs) -> dict[str, Any]:
    """One rival over its runs. ``agreement``: share of our tokens that it would have chosen too."""
    found = [run["rival"] for run in runs]
    steps = np.concatenate([run["step_s"] for run in runs]) * 1e3
    means = _means(runs)
    same = [a == b for run in runs for a, b in zip(run["rival"]["argmax"], run["token_ids"], strict=False)]
    return {
        "tpot_ms": {
            "median": median(means), "min": min(means), "max": max(means), "p95": float(np.percentile(steps, 95)),
        },
        "ttft_s": median(one["ttft_s"] for one in found),
        "read_mb_per_token": sum(one["decode_read_bytes"] for one in found) / steps.size / 1e6,
        "load_s": median(one["load_s"] for one in found),
        "load_read_mb": median(one["load_read_bytes"] for one in found) / 1e6,
        "peak_rss_bytes": max(one["peak_rss_bytes"] for one in found),
        "limit_bytes": runs[0]["limit_bytes"],
        "agreement": sum(same) / len(same),
        "version": found[-1]["version"],
        "settings": found[-1]["settings"],
        "tokens": int(steps.size),
        "runs": len(runs),
    }  # fmt: skip


def _arm(runs: Sequence[Mapping[str, Any]], dense_s: float) -> dict[str, Any]:
    """One arm over its runs. TPOT of a run is the mean over its tokens; ``p95`` is over all tokens."""
    means = _means(runs)
    steps = np.concatenate([run["step_s"] for run in runs]) * 1e3
    decode = [run["report"]["decode"] for run in runs]
    per_token = {name: _mean(decode, name) for name in PER_TOKEN}
    compute_ms = 1e3 * _compute_s(decode, dense_s)
    stall_ms = per_token["stall_s_per_token"] * 1e3
    tpot = median(means)
    beside_ms = 1e3 * sum(row.get("beside_s_per_token") or 0.0 for row in decode) / len(decode)
    overhead_ms = sum(means) / len(means) - compute_ms - stall_ms - beside_ms
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
        "overlap": max(0.0, 1 - stall_ms / (per_token["io_s_per_token"] * 1e3)) if per_token["io_s_per_token"] else 1.0,
        "beside_ms": beside_ms,
        "overhead_ms": overhead_ms,
        "overhead_share": overhead_ms * len(means) / sum(means),
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


def _compute_s(decode: Runs, dense_s: float) -> float:
    """Seconds a token in products; where the engine could not time them all, the experts' and ``dense_s``."""
    if any(row.get("product_s_per_token") is None for row in decode):
        return _mean(decode, "expert_compute_s_per_token") + dense_s
    return _mean(decode, "product_s_per_token")


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(float(row[name]) for row in rows) / len(rows)


def oracle_gain(arms: Mapping[str, Any], best: str | None, name: str, kind: str) -> float | None:
    """Stall that ``name`` saves against cache-only ``best``, over what the best oracle of ``kind`` saves."""
    oracles = [arm["exposed_io_ms"] for other, arm in arms.items() if other.startswith(kind)]
    if best is None or not oracles or not name.startswith((PREFETCH, ADVICE, ORACLE, ORACLE_ALL)):
        return None
    possible = arms[best]["exposed_io_ms"] - min(oracles)
    return (arms[best]["exposed_io_ms"] - arms[name]["exposed_io_ms"]) / possible if possible > 0 else None
