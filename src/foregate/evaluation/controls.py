"""The controls must read what they must, or nothing beside them can be believed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from foregate.analysis.prompt import Shape
from foregate.errors import ControlError
from foregate.evaluation.bootstrap import Bootstrap
from foregate.evaluation.judge import Judged

FRESH = 0.999
"""Least recall of the true router asked on its recorded input: features are rounded to 16 bits, and scores tie."""

SIGMAS = 4.0
"""How far from chance the shuffled control may read, in standard errors over prompts and layers."""


def check_controls(judged: Mapping[str, Judged], shape: Shape, reads: int, draws: Bootstrap) -> list[str]:
    """One line a control. Raises ControlError for the first that is off. ``fresh-gate`` may be missing."""
    lines = [_none(judged["none"]), _oracle(judged["oracle"], reads >= max(shape.top_k))]
    lines.append(_shuffled(judged["shuffled"], shape, draws))
    if "fresh-gate" in judged:
        lines.append(_fresh(judged["fresh-gate"]))
    return lines


def _rate(one: Judged, metric: str) -> float:
    made = one.made.sum()
    return float(one.sums[:, one.metrics.index(metric)].sum() / made) if made else float("nan")


def _none(one: Judged) -> str:
    read = sum(float(table[:, 2].sum()) for table in one.covered.values())
    read += sum(sim.issued for sim in one.sims.values())
    if one.made.sum() or read:
        raise ControlError(f"control none reads {read:g} experts ahead and ranks {one.made.sum():g} layers, not 0")
    return "none: reads nothing, covers nothing"


def _oracle(one: Judged, all_may_be_read: bool) -> str:
    for metric in ("recall_at_k", "exact_set", "top1", "jaccard"):
        if _rate(one, metric) != 1.0:
            raise ControlError(f"control oracle has {metric} {_rate(one, metric):.4f}, not 1")
    for (policy, share), table in one.covered.items():
        hit, missing = table[:, 0].sum(), table[:, 1].sum()
        if all_may_be_read and hit != missing:
            raise ControlError(f"control oracle covers {hit:g} of {missing:g} misses ({policy}, {share:.0%}), not all")
    return "oracle: 1 in every metric" + (", covers every miss" if all_may_be_read else "")


def _fresh(one: Judged) -> str:
    rate = _rate(one, "recall_at_k")
    if not rate >= FRESH:
        raise ControlError(
            f"control fresh-gate has recall {rate:.4f}, not 1: routers asked on recorded inputs do not repeat the trace"
        )
    return f"fresh-gate: recall {rate:.4f}"


def _shuffled(one: Judged, shape: Shape, draws: Bootstrap) -> str:
    """At chance within its interval: over prompts, and over layers, since each has a permutation of its own."""
    recall = one.sums[:, 0]
    rate = float(recall.sum() / one.made.sum())
    by_layer = recall.sum(axis=0) / np.maximum(one.made.sum(axis=0), 1)
    over_layers = float(np.std(by_layer, ddof=1) / np.sqrt(len(by_layer))) if len(by_layer) > 1 else 1.0
    error = float(np.hypot(draws.spread(recall.sum(axis=1), one.made.sum(axis=1)), over_layers))
    chance = float(np.mean([k / e for k, e in zip(shape.top_k, shape.experts_per_layer, strict=True)]))
    if not abs(rate - chance) <= SIGMAS * error:
        raise ControlError(f"control shuffled has recall {rate:.4f} ± {error:.4f}; chance is {chance:.4f}")
    return f"shuffled: recall {rate:.4f} ± {error:.4f} (one standard error), chance {chance:.4f}"
