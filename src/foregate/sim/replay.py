"""Decode tokens of a trace through the engine's own cache, pipeline and prefetcher, on a virtual clock.

An event is one MoE layer of one token; its k experts are needed together. Shapes: T tokens, L layers, k chosen,
R ranked experts, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.belady import Belady
from foregate.analysis.prompt import Shape
from foregate.analysis.replay import Event, Keys
from foregate.errors import ConfigError
from foregate.experts.cache import ExpertCache
from foregate.experts.echo import Echo
from foregate.experts.policy import POLICIES
from foregate.experts.slots import SlotPool
from foregate.interfaces import EvictionPolicy
from foregate.prefetch.controller import Controller
from foregate.prefetch.pipeline import Pipeline
from foregate.prefetch.prefetcher import Prefetcher
from foregate.sim.device import Device
from foregate.sim.link import SimTransfer, VirtualClock
from foregate.types import ALIGNMENT, ExpertKey, Moment, Prediction

SIM_POLICIES = (*POLICIES.names, "belady")


@dataclass(frozen=True, slots=True)
class Forecast:
    """Rankings made at ``moment``, by lead: of the expert sets ``ranks[lead][t, l]`` [R] that MoE layer l of token t
    needs, best first and filled up with -1, ``lead`` layers before (0: in the same layer)."""

    moment: Moment
    ranks: Mapping[int, NDArray[np.int16]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is simulated. ``reads`` is the most speculative reads for one layer of one token, over all leads: equal
    bytes for every method. ``far_share`` of them may be spent before the last lead."""

    policy: str
    slots: int
    reads: int
    far_share: float = 0.5


@dataclass(slots=True)
class SimResult:
    """Counts of experts, and seconds of virtual time. Bytes are counts times the device's expert bytes.

    ``uses`` = ``hits`` + ``misses``; ``used`` speculative reads were needed, ``late`` of them not yet complete;
    ``wasted`` were complete and not needed, ``cancelled`` were not even complete. ``busy_s``: seconds that the link
    read; ``wasted_s``, of them, for what was never used.
    """

    events: int = 0
    uses: int = 0
    hits: int = 0
    misses: int = 0
    issued: int = 0
    used: int = 0
    late: int = 0
    wasted: int = 0
    cancelled: int = 0
    stall_s: float = 0.0
    total_s: float = 0.0
    busy_s: float = 0.0
    wasted_s: float = 0.0

    @property
    def absent(self) -> int:
        """Uses that the cache alone did not serve: read on demand, or read ahead."""
        return self.misses - self.late + self.used

    def recall_on_misses(self) -> float:
        """Share of the absent that a speculative read was submitted for in time to be used, late ones included."""
        return self.used / self.absent if self.absent else 0.0


class Simulation:
    """One cache, one link, one method. Feed it the prompts in order; raises ConfigError for a cache that cannot hold
    one layer's choice."""

    def __init__(self, shape: Shape, device: Device, plan: Plan, keys: Keys, future: Sequence[Event]) -> None:
        """``future``: every event that will be replayed, in order (for belady); ``keys`` made them."""
        if plan.slots < max(shape.top_k):
            raise ConfigError(f"simulated cache of {plan.slots} experts: one layer chooses {max(shape.top_k)}")
        self._shape, self._device, self._plan, self._keys = shape, device, plan, keys
        self._clock = VirtualClock()
        self._transfer = SimTransfer(device, self._clock)
        self._policy = _policy(plan.policy, future)
        self._cache = ExpertCache(SlotPool(plan.slots, ALIGNMENT), self._policy)
        controller = Controller(
            plan.reads, expert_bytes=device.expert_bytes, chunk_bytes=device.chunk_bytes, layers=shape.layers
        )
        self._prefetcher = Prefetcher(
            self._cache, self._transfer, controller, experts=shape.experts_per_layer, top_k=max(shape.top_k)
        )
        self._pipeline = Pipeline(self._cache, self._transfer, self._prefetcher)
        self._events = 0

    def prompt(
        self, experts: NDArray[np.int32], forecasts: Sequence[Forecast], worths: NDArray[np.float32] | None = None
    ) -> None:
        """One prompt's decode tokens: ``experts`` [T, L, k], -1 where a layer chooses fewer.

        ``worths`` [T, L, E]: what the policy ``echo`` knows once a layer is routed (``analysis.worths``); without, it
        takes choices from the accesses. No other policy looks at them.
        """
        self._worths = worths if isinstance(self._policy, Echo) else None
        self._prefetcher.begin()
        self._cache.set_staging(self._staging(forecasts))
        asked = _by_moment(forecasts)
        chosen = experts.tolist()
        self._spent = np.zeros(experts.shape[:2], np.int32)
        self._last_lead = min((lead for forecast in forecasts for lead in forecast.ranks), default=0)
        for token, layers in enumerate(chosen):
            for layer, needed in enumerate(layers):
                self._layer(token, layer, [e for e in needed if e >= 0], asked)
        self._transfer.rest()
        self._prefetcher.expire()
        self._transfer.rest()
        self._prefetcher.settle()

    def result(self) -> SimResult:
        """What has happened so far. Raises IntegrityError if the cache's books do not balance."""
        self._cache.check_integrity(idle=True)
        served, ahead = self._pipeline.stats, self._prefetcher.stats
        return SimResult(
            events=self._events,
            uses=served.hits + served.misses,
            hits=served.hits,
            misses=served.misses,
            issued=ahead.issued,
            used=ahead.used,
            late=served.late,
            wasted=ahead.wasted,
            cancelled=ahead.cancelled,
            stall_s=self._transfer.stall_s,
            total_s=self._events * self._device.layer_s + self._transfer.stall_s,
            busy_s=self._transfer.busy_s,
            wasted_s=max(0.0, self._transfer.busy_s - (served.misses - served.late + ahead.used) * self._device.read_s),
        )

    def _layer(self, token: int, layer: int, needed: list[int], asked: Mapping[Moment, _Leads]) -> None:
        self._events += 1
        self._consider(token, layer, Moment.BEFORE_ATTENTION, asked)
        self._clock.now += self._device.attention_s
        self._consider(token, layer, Moment.AFTER_ATTENTION, asked)
        self._prefetcher.arrived(layer)
        if self._worths is not None and isinstance(self._policy, Echo):
            self._policy.tell(layer, self._worths[token, layer])
        share = self._device.experts_s / len(needed) if needed else 0.0

        def compute(expert: int, slot: int) -> None:
            self._clock.now += share

        speculate = partial(self._consider, token, layer, Moment.AFTER_ROUTING, asked)
        self._pipeline.decode(layer, needed, compute, lambda: speculate)

    def _consider(self, token: int, layer: int, moment: Moment, asked: Mapping[Moment, _Leads]) -> None:
        for lead, ranks in asked.get(moment, ()):
            at = layer + lead
            there, target = token + at // self._shape.layers, at % self._shape.layers
            if there < len(ranks):
                self._ask(lead, moment, layer, there, target, ranks[there][target])

    def _ask(self, lead: int, moment: Moment, layer: int, token: int, target: int, ranks: list[int]) -> None:
        """Submit the best absent experts of one ranking, as far as this layer of this token has reads left."""
        reads = self._plan.reads
        allowed = reads if lead == self._last_lead else int(reads * self._plan.far_share)
        room = allowed - int(self._spent[token, target])
        if room <= 0:
            return
        absent = self._absent(target, ranks, room)
        if absent:
            before = self._prefetcher.stats.issued
            ahead = Prediction(layer + lead, tuple(absent), ())
            self._prefetcher.consider(layer, moment, [ahead])
            self._spent[token, target] += self._prefetcher.stats.issued - before

    def _absent(self, layer: int, ranks: list[int], room: int) -> list[int]:
        found: list[int] = []
        for expert in ranks:
            if expert >= 0 and self._cache.state(ExpertKey(layer, expert)) is None:
                found.append(expert)
                if len(found) == room:
                    break
        return found

    def _staging(self, forecasts: Sequence[Forecast]) -> int:
        """Slots set aside, by the engine's own rule: reads x lookahead, at most a quarter, k left for a layer."""
        deepest = max((max(lead, 1) for forecast in forecasts for lead in forecast.ranks), default=0)
        wanted = self._plan.reads * deepest
        return max(0, min(wanted, self._plan.slots // 4, self._plan.slots - max(self._shape.top_k)))


_Leads = Sequence[tuple[int, list[list[list[int]]]]]


def _by_moment(forecasts: Sequence[Forecast]) -> dict[Moment, _Leads]:
    """Lead and rankings (as lists, for speed) of every forecast, nearest lead first."""
    out: dict[Moment, list[tuple[int, list[list[list[int]]]]]] = {}
    for forecast in forecasts:
        for lead, ranks in forecast.ranks.items():
            out.setdefault(forecast.moment, []).append((lead, ranks.tolist()))
    return {moment: sorted(leads, key=lambda item: item[0]) for moment, leads in out.items()}


def _policy(name: str, future: Sequence[Event]) -> EvictionPolicy:
    if name == "belady":
        return Belady(future)
    policy: EvictionPolicy = POLICIES.load(name)()
    return policy


def decode_events(keys: Keys, experts: NDArray[np.int32]) -> list[Event]:
    """Events of ``experts`` [T, L, k] in execution order."""
    return [keys.event(layer, chosen) for token in experts.tolist() for layer, chosen in enumerate(token)]
