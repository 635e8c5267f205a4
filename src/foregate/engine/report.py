"""The record of one run: what ``foregate run --json`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from foregate.types import FinishReason, GenerationStep, Phase, StepStats


@dataclass(slots=True)
class RunReport:
    """Figures of one generation. Seconds and bytes. ``cold`` is true when the cache was empty at its start."""

    model: str
    predictor: str
    prefetch: str
    lookahead: int
    cache_policy: str
    store: str
    direct_io: bool
    cold: bool
    prompt_tokens: int
    budget_bytes: int
    slots: int
    experts: int
    dense_bytes: int
    load_s: float
    products_timed: bool = False
    """Whether the engine's clock sees the dense products too."""
    staging_slots: int = 0
    overhead_bytes: int = 0
    controller: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    readers: dict[str, Any] = field(default_factory=dict)
    advised: bool = False
    """Whether the eviction policy took advice from the predictor, and still does."""
    advice_fault: str = ""
    """Why the predictor was asked for advice no more."""
    lossy: dict[str, Any] | None = None
    """Mode and measured deviation of a run whose tokens may differ from the exact one's."""
    steps: list[GenerationStep] = field(default_factory=list)
    resident_bytes_peak: int = 0
    rss_peak_bytes: int = 0

    @property
    def decode(self) -> list[GenerationStep]:
        """Steps after the first token."""
        return [step for step in self.steps if step.phase is Phase.DECODE]

    @property
    def tpot_s(self) -> float:
        """Mean seconds per token after the first; 0 when there is only one."""
        times = [step.stats.wall_s for step in self.decode]
        return sum(times) / len(times) if times else 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON form. ``expert_cache``, ``read_bytes`` and stalls sum over prefill and decode.

        ``prefetch`` is what was predicted, which happens in decode only; a prompt's reading ahead of whole layers is in
        ``prefill`` and counts as demand. A hit needed no wait; ``used - late`` of the hits were read ahead.
        """
        total, prefill, decode = _sum(self.steps), _sum(self.steps[:1]), _sum(self.decode)
        times = [step.stats.wall_s for step in self.decode]
        return {
            "model": self.model,
            "exact": self.lossy is None,
            "lossy": self.lossy,
            "text": "".join(step.text for step in self.steps),
            "token_ids": [step.token_id for step in self.steps],
            "finish_reason": (self.steps[-1].finish or FinishReason.LENGTH).value if self.steps else None,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self.steps),
            "load_s": self.load_s,
            "ttft_s": self.steps[0].stats.wall_s if self.steps else 0.0,
            "tpot_s": self.tpot_s,
            "tpot_median_s": median(times) if times else 0.0,
            "expert_cache": {"hits": total.hits, "misses": total.misses, "evictions": total.evictions},
            "read_bytes": {
                "demand": total.demand_bytes + prefill.prefetch_bytes,
                "prefetch": decode.prefetch_bytes,
            },
            "prefetch": _fates(decode),
            "prefill": _prefill(prefill),
            "read_retries": total.retries,
            "stall_s": total.stall_s,
            "stall": {"demand_s": total.demand_stall_s, "late_prefetch_s": total.late_stall_s},
            "overlap_ratio": overlap(total),
            "decode": _decode(decode, len(self.decode), timed=self.products_timed),
            "resident_bytes_peak": self.resident_bytes_peak,
            "budget_bytes": self.budget_bytes,
            "slots": self.slots,
            "staging_slots": self.staging_slots,
            "experts": self.experts,
            "dense_bytes": self.dense_bytes,
            "overhead_bytes": self.overhead_bytes,
            "rss_peak_bytes": self.rss_peak_bytes,
            "predictor": self.predictor,
            "prefetch_setting": self.prefetch,
            "lookahead": self.lookahead,
            "cache_policy": self.cache_policy,
            "eviction_advised": self.advised,
            "eviction_advice_fault": self.advice_fault or None,
            "controller": self.controller,
            "prefetch_ledger": self.ledger,
            "store": self.store,
            "readers": self.readers,
            "direct_io": self.direct_io,
            "cold": self.cold,
        }


def overlap(stats: StepStats) -> float:
    """Share of the time in which the disk was read that the model did not wait for it; 1 when nothing was read."""
    return max(0.0, 1.0 - stats.stall_s / stats.io_s) if stats.io_s > 0 else 1.0


def hit_rate(stats: StepStats) -> float:
    """Share of needed experts that were ready without waiting; 1 when none was needed."""
    needed = stats.hits + stats.misses
    return stats.hits / needed if needed else 1.0


def _sum(steps: Sequence[GenerationStep]) -> StepStats:
    total = StepStats()
    for step in steps:
        total.add(step.stats)
    return total


def _fates(stats: StepStats) -> dict[str, int]:
    return {name: getattr(stats, name) for name in ("issued", "used", "late", "wasted", "cancelled")}


def _prefill(stats: StepStats) -> dict[str, Any]:
    """The prompt's pass: experts needed, bytes read, and what reading whole layers ahead came to."""
    return {
        "hits": stats.hits,
        "misses": stats.misses,
        "read_bytes": stats.demand_bytes + stats.prefetch_bytes,
        "stall_s": stats.stall_s,
        "overlap_ratio": overlap(stats),
        "streamed_ahead": _fates(stats),
    }


def _decode(stats: StepStats, tokens: int, *, timed: bool) -> dict[str, Any]:
    """Decode alone, per token where that is what people compare. ``timed``: products are, all of them."""
    per = 1 / tokens if tokens else 0.0
    return {
        "tokens": tokens,
        "hit_rate": hit_rate(stats),
        "read_bytes_per_token": (stats.demand_bytes + stats.prefetch_bytes) * per,
        "stall_s_per_token": stats.stall_s * per,
        "demand_stall_s_per_token": stats.demand_stall_s * per,
        "late_stall_s_per_token": stats.late_stall_s * per,
        "io_s_per_token": stats.io_s * per,
        "expert_compute_s_per_token": stats.compute_s * per,
        "product_s_per_token": stats.product_s * per if timed else None,
        "beside_s_per_token": stats.beside_s * per if timed else None,
        "predict_s_per_token": stats.predict_s * per,
        "overlap_ratio": overlap(stats),
        "read_bytes": {"demand": stats.demand_bytes, "prefetch": stats.prefetch_bytes},
        "hits": stats.hits,
        "misses": stats.misses,
        "evictions": stats.evictions,
    }
