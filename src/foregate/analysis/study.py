"""One analysis from beginning to end: two readings of the traces, then the sections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from foregate.analysis.accuracy import Accuracy
from foregate.analysis.crosslayer import CrossLayer
from foregate.analysis.domains import Domains
from foregate.analysis.hitcurve import HitCurves
from foregate.analysis.locality import Locality
from foregate.analysis.pairs import check_bytes
from foregate.analysis.paths import Paths
from foregate.analysis.predictability import section_of
from foregate.analysis.section import Collector, Section
from foregate.analysis.settings import Settings
from foregate.analysis.source import Source
from foregate.analysis.timings import Timings
from foregate.analysis.usage import Usage
from foregate.errors import TraceError
from foregate.trace.sample import spoken


class Progress(Protocol):
    """Told what is going on; ``total`` 0 means that the end cannot be foretold."""

    def stage(self, name: str, total: int) -> None: ...

    def advance(self, rows: int) -> None: ...


class Silent:
    """Shows nothing."""

    def stage(self, name: str, total: int) -> None:
        pass

    def advance(self, rows: int) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Study:
    """What an analysis found. ``facts`` describe the traces; JSON takes them."""

    facts: dict[str, Any]
    sections: list[Section]


def analyse(paths: Sequence[Path], settings: Settings | None = None, progress: Progress | None = None) -> Study:
    """Read the traces twice, part by part. Raises TraceError for traces that cannot be analysed together, ConfigError
    where the counts would not fit ``settings.count_bytes``."""
    settings, progress = settings or Settings(), progress or Silent()
    source = Source(paths, settings)
    memory = check_bytes(source.shape, settings.max_hop, settings.count_bytes)
    cross = CrossLayer(source.shape, settings)
    usage, cache = Usage(source.shape, settings), HitCurves(source.shape, settings)
    routes, locality = Paths(source.shape, settings), Locality(source.shape, settings)
    domains, timings = Domains(source.shape, settings), Timings(source.shape, settings)
    collectors: list[Collector] = [usage, routes, locality, cache, domains, timings]
    tokens = _count(source, [cross, *collectors], progress)
    facts = _facts(source, settings, tokens, memory)
    cross.flush()
    scores = _score(source, cross, settings, progress)
    accuracy = section_of(scores, _no_scores(source))
    between = cross.finish()
    progress.stage("replaying events", cache.work)
    hits = cache.finish(progress.advance)
    progress.stage("comparing domains", 0)
    rest = [routes.finish(), locality.finish(), hits, domains.finish(), timings.finish()]
    return Study(facts, [accuracy, between, usage.finish(), *rest])


def _count(source: Source, collectors: Sequence[Collector], progress: Progress) -> dict[str, int]:
    tokens = {"prefill": 0, "decode": 0}
    progress.stage("counting decisions", source.rows)
    for prompt in source.prompts(on_part=progress.advance):
        decode = int(prompt.decode.sum())
        tokens["decode"] += decode
        tokens["prefill"] += prompt.tokens - decode
        for collector in collectors:
            collector.add(prompt)
    if not sum(tokens.values()):
        raise TraceError(f"{source.readers[0].path}: no {source.settings.phase} tokens, nothing to analyse")
    return tokens


def _score(source: Source, cross: CrossLayer, settings: Settings, progress: Progress) -> Accuracy | None:
    test = [item for item in source.items if item.test]
    if not test or not cross.train.tokens:
        return None
    scores = Accuracy(cross.train, source.domains, len(test), settings)
    progress.stage("scoring decisions", sum(item.entry.rows for item in test))
    for prompt in source.prompts(test_only=True, on_part=progress.advance):
        scores.add(prompt)
    return scores


def _no_scores(source: Source) -> str:
    if len(source.items) == 1:
        return "One prompt cannot be split into train and test: accuracy would be that of what was counted. Trace more."
    return "No split into train and test prompts with tokens on both sides: no accuracy. Trace more prompts."


def _facts(source: Source, settings: Settings, tokens: dict[str, int], memory: int) -> dict[str, Any]:
    model = source.model
    total = sum(tokens.values())
    return {
        "traces": [spoken(reader.path) for reader in source.readers],
        "complete": all(reader.complete for reader in source.readers),
        "sources": sorted({run.source for reader in source.readers for run in reader.header.runs}),
        "model": model.name,
        "model_type": model.model_type,
        "fingerprint": model.fingerprint,
        "layers": model.layers,
        "experts_per_layer": list(model.experts_per_layer),
        "top_k": list(model.top_k),
        "prompts": len(source.items),
        "test_prompts": sum(item.test for item in source.items),
        "domains": list(source.domains),
        "phase": settings.phase,
        "tokens": total,
        "tokens_by_phase": tokens,
        "decisions": total * model.layers,
        "seed": settings.seed,
        "permutations": settings.permutations,
        "max_hop": settings.max_hop,
        "pair_count_bytes": memory,
    }
