"""Turns the running counters of cache, transfer, pipeline and prefetcher into one StepStats per forward pass."""

from __future__ import annotations

from operator import attrgetter, sub
from time import perf_counter

from foregate.engine.clock import Clock
from foregate.experts.cache import ExpertCache
from foregate.experts.paired_transfer import PairedTransfer
from foregate.experts.readers import AnyTransfer
from foregate.prefetch.pipeline import Pipeline
from foregate.prefetch.prefetcher import Prefetcher
from foregate.types import StepStats


class Meter:
    """``lap()`` gives what has happened since the last lap; ``last`` is what it gave."""

    def __init__(
        self,
        cache: ExpertCache,
        transfer: AnyTransfer | PairedTransfer,
        pipeline: Pipeline,
        prefetcher: Prefetcher,
        clock: Clock,
    ) -> None:
        self._cache = cache
        self._transfer = transfer
        self._pipeline = pipeline
        self._prefetcher = prefetcher
        self._clock = clock
        self._before = self._now()
        self.last = StepStats()

    def lap(self) -> StepStats:
        """Differences of every counter since the last call; ``wall_s`` is the time between."""
        now, before = self._now(), self._before
        self._before, self.last = now, StepStats(*map(sub, now, before))
        return self.last

    def _now(self) -> tuple[float, ...]:
        moved = self._transfer.stats()
        own = StepStats(
            wall_s=perf_counter(),
            evictions=self._cache.evictions,
            product_s=self._clock.ns * 1e-9,
            beside_s=self._clock.beside_ns * 1e-9,
            demand_bytes=moved.demand_bytes,
            prefetch_bytes=moved.prefetch_bytes,
            retries=moved.retries + moved.rereads,
            io_s=moved.active_s,
        )
        parts = own, self._pipeline.stats, self._prefetcher.stats
        return tuple(map(sum, zip(*map(_values, parts), strict=True)))


_values = attrgetter(*StepStats.__dataclass_fields__)
