"""The scores of ``accuracy.py`` as tables and charts: by hop, by pair of layers, against chance and popularity."""

from __future__ import annotations

from typing import Any

import numpy as np

from foregate.analysis.accuracy import METHODS, METRICS, PHASES, Accuracy, chance
from foregate.analysis.chart import Chart, Heat, Lines, Series, numbers
from foregate.analysis.ratio import RatioSums
from foregate.analysis.section import Section
from foregate.analysis.table import records

HOP_COLUMNS = ("domain", "phase", "method", "metric", "hop", "value", "low", "high", "chance", "cases", "prompts")
PAIR_COLUMNS = ("phase", "method", "metric", "layer", "later", "hop", "value", "cases")
METHOD = (
    "Counts come from train prompts, scores from test prompts (split by the hash of the prompt's tokens, within each "
    "domain). layer: sum over the k experts of layer l of P(b | a), smoothed by one pseudo-count (Markov). prefix: "
    "naive Bayes over layers 0..l: log P(b) plus the sum of log P(b | a) / P(b), each shrunk by its reliability "
    "(empirical Bayes) and halved for every layer farther back, because neighbours repeat each other. popularity: "
    "P(b). previous-token: what this layer chose for the token before, then popularity. top1: the best guess is among "
    "the k chosen; recall_k: share of the k chosen that is among the k best guesses; recall_2k: among 2k; exact_set: "
    "all k. Intervals are 95 %, over prompts. Misses are those of an event-atomic LRU cache, cold at first, over "
    "decode tokens of test prompts."
)


def section_of(scores: Accuracy | None, reason: str) -> Section:
    """The section; without ``scores`` it says why in ``reason``."""
    section = Section("accuracy", "Prediction by hop", "test prompts; phase and scope with every number", METHOD)
    if scores is None or not scores.tokens:
        section.notes.append(reason)
        return section
    scores.flush()
    rows = _by_hop(scores)
    what = "Accuracy by hop; domain 'all' is all of them; hop 0 is layer 0, which only temporal methods can predict"
    section.tables.append(records("accuracy_by_hop", what, rows, HOP_COLUMNS))
    section.tables.append(
        records("accuracy_by_pair", "Accuracy of every pair of layers, all domains", _by_pair(scores), PAIR_COLUMNS)
    )
    section.arm = f"all experts and LRU misses, {scores.tokens:,} test tokens; phase and scope with every number"
    everything = [row for row in rows if row["domain"] == "all"]
    phases = [phase for phase in PHASES if any(row["phase"] == phase for row in everything)]
    section.summary = {phase: _summary([row for row in everything if row["phase"] == phase]) for phase in phases}
    section.findings = [text for phase in phases for text in _finding(phase, section.summary[phase])]
    section.charts = [chart for phase in phases for chart in _charts(phase, everything, scores)]
    if "decode" not in phases:
        section.notes.append("No decode tokens in the test prompts: no recall on misses.")
    return section


def _by_hop(scores: Accuracy) -> list[dict[str, Any]]:
    rows = []
    everything = scores.hops.summed(0)
    views: list[tuple[str, RatioSums, tuple[int, ...]]] = [("all", everything, ())]
    if len(scores.domains) > 1:
        views += [(name, scores.hops, (n,)) for n, name in enumerate(scores.domains)]
    for domain, sums, front in views:
        for m, method in enumerate(METHODS):
            for p, phase in enumerate(PHASES):
                for hop in range(scores.longest + 1):
                    for q, metric in enumerate(scores.metrics):
                        found = sums.at((*front, m, p, hop, q))
                        if found.cases:
                            values = (found.value, found.low, found.high, _chance(scores, metric, hop))
                            row = (domain, phase, method, metric, hop, *values, found.cases, found.prompts)
                            rows.append(dict(zip(HOP_COLUMNS, row, strict=True)))
    return rows


def _chance(scores: Accuracy, metric: str, hop: int) -> float:
    """Mean over the layers that a prediction of ``hop`` is made for."""
    shape = scores.shape
    layers = [0] if hop == 0 else range(hop, shape.layers)
    return float(np.mean([chance(metric, shape.top_k[n], shape.experts_per_layer[n]) for n in layers]))


def _by_pair(scores: Accuracy) -> list[dict[str, Any]]:
    above, below = scores.pairs
    rows = []
    for m, p, layer, later, q in zip(*np.nonzero(below), strict=True):
        at = (m, p, layer, later, q)
        row = (PHASES[p], METHODS[m], scores.metrics[q], int(layer), int(later), int(later - layer))
        rows.append(dict(zip(PAIR_COLUMNS, (*row, above[at] / below[at], int(below[at])), strict=True)))
    return rows


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """{metric: {method: {hop: value}}}, with chance among the methods."""
    out: dict[str, Any] = {}
    for row in rows:
        methods = out.setdefault(row["metric"], {})
        methods.setdefault(row["method"], {})[row["hop"]] = row["value"]
        methods.setdefault("chance", {})[row["hop"]] = row["chance"]
    return out


def _finding(phase: str, summary: dict[str, Any]) -> list[str]:
    recall = summary["recall_k"]
    if 1 not in recall.get("layer", {}):
        return []
    farthest = max(recall["prefix"])
    told = (
        f"{phase}, all experts: one layer ahead, recall_k is {recall['layer'][1]:.3f} from one layer and "
        f"{recall['prefix'][1]:.3f} from the whole prefix, against popularity {recall['popularity'][1]:.3f} and chance "
        f"{recall['chance'][1]:.3f}; {farthest} layers ahead the prefix gives {recall['prefix'][farthest]:.3f}."
    )
    return [told, *_on_misses(phase, summary)]


def _on_misses(phase: str, summary: dict[str, Any]) -> list[str]:
    out = []
    for metric in summary:
        values = summary[metric]
        if metric not in METRICS and 1 in values.get("prefix", {}):
            scope = metric.removeprefix("recall_k on ")
            told = f"layer {values['layer'][1]:.3f}, prefix {values['prefix'][1]:.3f}"
            out.append(f"{phase}, {scope}, one layer ahead: {told}, previous-token {values['previous-token'][1]:.3f}.")
    return out


def _charts(phase: str, rows: list[dict[str, Any]], scores: Accuracy) -> list[Chart]:
    charts: list[Chart] = []
    mine = [row for row in rows if row["phase"] == phase and row["hop"] > 0]
    for metric in scores.metrics:
        found = [row for row in mine if row["metric"] == metric]
        if found and metric not in ("recall_2k",):
            name = f"{_slug(metric)}_by_hop_{phase}"
            scope = "" if metric not in METRICS else ", all experts"
            charts.append(Lines(name, f"{metric} by hop, {phase}{scope}", "hop", metric, _series(found)))
    above, below = (part[0, PHASES.index(phase), :, :, 1] for part in scores.pairs)
    if scores.shape.layers > 1:
        values = np.full(below.shape, np.nan)
        np.divide(above, below, out=values, where=below > 0)
        title = f"recall_k from one layer, {phase}, all experts"
        charts.append(Heat(f"recall_by_pair_{phase}", title, "predicted layer", "from layer", "recall_k", values))
    return charts


def _series(rows: list[dict[str, Any]]) -> list[Series]:
    series = []
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        columns = {key: numbers(row[key] for row in mine) for key in ("value", "low", "high")}
        hops = [float(row["hop"]) for row in mine]
        series.append(Series(method, hops, columns["value"], columns["low"], columns["high"]))
    hops = [float(row["hop"]) for row in rows if row["method"] == METHODS[0]]
    guess = [row["chance"] for row in rows if row["method"] == METHODS[0]]
    return [*series, Series("chance", hops, numbers(guess), dashed=True)]


def _slug(metric: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in metric.lower()).strip("_").replace("__", "_")
