"""Which experts a trace uses most: what a pack of mixed precision keeps finer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from foregate.errors import ConfigError, TraceError
from foregate.trace.reader import TraceReader
from foregate.types import ExpertKey


def most_used(trace: Path, share: float, fingerprint: str) -> frozenset[ExpertKey]:
    """``share`` (0 … 1) of all experts: those chosen most often, over all layers; ties go to the first.

    Raises ConfigError for a share that is none, TraceError for a trace of another model than ``fingerprint``.
    """
    if not 0 < share < 1:
        raise ConfigError(f"share of experts to keep {share:.4g}: must be between 0 and 1 (0% and 100%)")
    reader = TraceReader(trace)
    info = reader.header.model
    if info.fingerprint != fingerprint:
        raise TraceError(f"{trace}: a trace of another model ({info.name}, fingerprint {info.fingerprint})")
    counts: Counter[ExpertKey] = Counter()
    for part in reader:
        for layer, row in zip(part.layer.tolist(), part.experts.tolist(), strict=True):
            counts.update(ExpertKey(layer, expert) for expert in row)
    everyone = [ExpertKey(layer, e) for layer, size in enumerate(info.experts_per_layer) for e in range(size)]
    everyone.sort(key=lambda key: (-counts[key], key))
    return frozenset(everyone[: max(1, round(share * len(everyone)))])
