"""What is seen in a chart, as one sentence made from the numbers of a study. Nothing here is typed in by hand.

A chart without a sentence of its own has none in ``captions``. Used by the notebook and the gallery.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from foregate.analysis.chart import Chart, Heat, Lines, Matrices
from foregate.analysis.study import Study


def captions(study: Study) -> dict[str, str]:
    """Chart name → sentence, for the charts that this study has."""
    charts = {chart.name: chart for section in study.sections for chart in section.charts}
    numbers = {section.name: section.summary for section in study.sections}
    out = {}
    for name, chart in charts.items():
        for prefix, tell in TELLERS.items():
            if name.startswith(prefix):
                out[name] = tell(chart, numbers)
    return out


def _hops(chart: Chart, numbers: dict[str, Any]) -> str:
    assert isinstance(chart, Lines)
    values = {series.name: [v for v in series.y if v is not None] for series in chart.series}
    layer, prefix, popular, guess = (values[key] for key in ("layer", "prefix", "popularity", "chance"))
    last = len(prefix)
    above = sum(p > max(q, g) for p, q, g in zip(prefix, popular, guess, strict=True))
    told = (
        f"One layer ahead, {chart.y_label} is {prefix[0]:.3f} from the whole prefix and {layer[0]:.3f} from one layer, "
        f"against {popular[0]:.3f} by popularity and {guess[0]:.3f} by chance"
    )
    if last == 1:
        return told + "."
    place = "every hop" if above == last else f"{above} of {last} hops"
    return f"{told}; {last} layers ahead the prefix still gives {prefix[-1]:.3f}, and is above both at {place}."


def _pairs(chart: Chart, numbers: dict[str, Any]) -> str:
    assert isinstance(chart, Heat)
    (row, column), best = _extreme(chart.values, np.nanargmax)
    (low_row, low_column), least = _extreme(chart.values, np.nanargmin)
    return (
        f"The best pair is layer {row} → {column} with {chart.value_label} {best:.3f}, the worst {low_row} → "
        f"{low_column} with {least:.3f}."
    )


def _affinity(chart: Chart, numbers: dict[str, Any]) -> str:
    found = numbers["cross_layer"]
    if found["strongest"] is None:
        return "No layer says anything about another."
    by_hop, best = found["affinity_by_hop"], found["strongest"]
    farthest = max(by_hop)
    return (
        f"Neighbouring layers share {by_hop[1]:.3f} of their entropy on average, layers {farthest} apart "
        f"{by_hop[farthest]:.3f}; the strongest pair is {best['layer']} → {best['later']} with {best['affinity']:.3f} "
        f"({best['mi_corrected']:.2f} bits)."
    )


def _conditional(chart: Chart, numbers: dict[str, Any]) -> str:
    assert isinstance(chart, Matrices)
    largest = {key: max(cells) for key, cells in chart.cells.items() if len(set(key.split(","))) == 2}
    if not largest:
        return "There are no two layers."
    key = max(largest, key=lambda pair: largest[pair])
    layer, later = key.split(",")
    at = chart.cells[key].index(largest[key])
    a, b = divmod(at, chart.sizes[int(later)])
    return (
        f"The strongest single rule: a token that chose expert {a} of layer {layer} chose expert {b} of layer {later} "
        f"in {(largest[key] / 255) ** 2:.0%} of the cases."
    )


def _entropy(chart: Chart, numbers: dict[str, Any]) -> str:
    found = numbers["usage"]
    by_layer, pooled = found["entropy_by_layer"], found["entropy_ids_pooled"]
    if not np.isfinite(by_layer):
        return "Layers with one expert leave no choice, and have no entropy."
    return (
        f"Normalised entropy is {by_layer:.3f} by layer and {pooled:.3f} with ids pooled over layers (published for "
        f"other models: 0.976, near uniform), but {found['entropy_within_prompt']:.3f} within a prompt."
    )


def _paths(chart: Chart, numbers: dict[str, Any]) -> str:
    first, whole = (numbers["paths"][kind] for kind in ("first expert", "whole set"))
    covered = f"{first['top100_share']:.1%} and {whole['top100_share']:.1%}"
    return (
        f"{first['tokens']:,} tokens took {first['distinct']:,.0f} different paths of first experts and "
        f"{whole['distinct']:,.0f} of whole sets; {first['once']:.1%} and {whole['once']:.1%} of the paths were taken "
        f"once, and the 100 most frequent cover {covered} of the tokens."
    )


def _overlap(chart: Chart, numbers: dict[str, Any]) -> str:
    found = numbers["locality"]["overlap_previous_token"]
    if not found:
        return "No prompt has two tokens."
    told = [f"{value['overlap']:.3f} ({phase})" for phase, value in found.items()]
    expected = next(iter(found.values()))["expected"]
    return f"Of the experts of a token, {' and '.join(told)} were the token before's too; independent: {expected:.3f}."


def _hits(chart: Chart, numbers: dict[str, Any]) -> str:
    assert isinstance(chart, Lines)
    rates = {series.name: dict(zip(series.x, series.y, strict=True)) for series in chart.series}
    if not rates["lru"]:
        return "At no residency would the cache hold what one layer chooses."
    residency = min(rates["lru"], key=lambda share: abs(share - 25))
    causal = {name: values[residency] for name, values in rates.items() if name != "belady"}
    best = max(causal, key=lambda name: causal[name] or 0)
    return (
        f"Over {_events(chart, numbers):,} events at {residency:.0f} % residency the best causal policy is {best} with "
        f"a hit rate of {causal[best]:.3f}; Belady, which knows the future, has {rates['belady'][residency]:.3f}."
    )


def _events(chart: Chart, numbers: dict[str, Any]) -> int:
    """Events of this arm; where large ones were cut to fit a small cache there are more, so the least number."""
    arm = chart.name.removeprefix("hit_curve_").replace("_", " ")
    return min(int(row["events"]) for row in numbers["cache"]["hit_rate"] if row["arm"] == arm)


def _domains(chart: Chart, numbers: dict[str, Any]) -> str:
    pairs = numbers["domains"]["pairs"]
    most = max(pairs, key=lambda row: row["divergence"])
    differ = sum(row["significant_layers"] > 0 for row in pairs)
    return (
        f"{differ} of {len(pairs)} pairs of domains differ significantly (5 %, corrected); the largest divergence is "
        f"{most['divergence']:.3f} bits between {most['first']} and {most['second']} ({most['null']:.3f} permuted)."
    )


def _timing(chart: Chart, numbers: dict[str, Any]) -> str:
    phase = chart.name.removeprefix("timing_")
    found = numbers["timing"][phase]
    total = sum(found["seconds"].values())
    parts = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in found["seconds"].items())
    told = f"{phase}: {parts} of layer time"
    if "routing_and_dispatch" not in found:
        return told + "."
    place = "inside" if found["in_published_range"] else "outside"
    return f"{told}; routing and dispatch together {found['routing_and_dispatch']:.1%}, {place} the published 47-59 %."


def _extreme(values: Any, which: Callable[[Any], Any]) -> tuple[tuple[int, int], float]:
    if not np.isfinite(values).any():
        return (0, 0), float("nan")
    row, column = np.unravel_index(int(which(values)), values.shape)
    return (int(row), int(column)), float(values[row, column])


TELLERS: dict[str, Callable[[Chart, dict[str, Any]], str]] = {
    "top1_by_hop": _hops,
    "recall_k_by_hop": _hops,
    "recall_k_on_lru_misses": _hops,
    "exact_set_by_hop": _hops,
    "recall_by_pair": _pairs,
    "affinity": _affinity,
    "conditional": _conditional,
    "entropy": _entropy,
    "path_coverage": _paths,
    "overlap": _overlap,
    "hit_curve": _hits,
    "domain_matrix": _domains,
    "timing": _timing,
}
"""Beginning of the name of a chart → who tells what is seen in it."""
