"""Hit rate of LRU, LFU, aged LFU and Belady over residency, by event-atomic replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from foregate.analysis.belady import Belady
from foregate.analysis.chart import Lines, Series, numbers
from foregate.analysis.prompt import Prompt, Shape
from foregate.analysis.replay import Event, Keys, Replay, split_events
from foregate.analysis.section import Section
from foregate.analysis.settings import Settings
from foregate.analysis.table import records
from foregate.experts.policy import POLICIES

Advance = Callable[[int], None]
CAUSAL = ("lru", "lfu", "lfru")
COLUMNS = ("arm", "policy", "residency", "slots", "events", "uses", "hits", "hit_rate")
METHOD = (
    "One global pool, cold at first, kept from prompt to prompt, no prefetch. An event is what a layer needs at once: "
    "the k experts of a decode token, or the union of a prefill pass; an expert that is resident when its event "
    "begins is a hit. A union above the pool is streamed through it in pieces. Belady (1966) is exact for these "
    "events. Residency is slots over all experts."
)


class HitCurves:
    """Holds the events of the replayed prompts: at most ``replay_events`` of each arm, 8 bytes a use and more."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.shape, self.settings = shape, settings
        self._keys = Keys(shape)
        self._arms: dict[str, list[Event]] = {"decode": [], "prefill and decode": []}
        self._prompts = 0

    def add(self, prompt: Prompt) -> None:
        if not prompt.replayed:
            return
        self._prompts += 1
        for arm, events in self._arms.items():
            found = prompt_events(prompt, self._keys, decode_only=arm == "decode")
            events.extend(found[: self.settings.replay_events - len(events)])

    @property
    def work(self) -> int:
        """Events that ``finish`` replays, over all policies and residencies."""
        return len(self.settings.residencies) * (len(CAUSAL) + 1) * sum(len(events) for events in self._arms.values())

    def finish(self, advance: Advance = lambda events: None) -> Section:
        """What was found; ``advance`` is told the events replayed."""
        arm = f"cache-only, all experts, {self._prompts:,} prompts; phase and residency with every number"
        section = Section("cache", "Hit curves", arm, METHOD)
        rows: list[dict[str, Any]] = []
        for name, events in self._arms.items():
            if self.settings.phase == "prefill" and name != "decode":
                name = "prefill"
            if not events or (self.settings.phase == "decode" and name != "decode"):
                if name == "decode" and self.settings.phase != "prefill":
                    section.notes.append("No decode tokens in the replayed prompts: no decode hit curve.")
                continue
            rows += self._curve(name, events, section, advance)
            section.charts.append(_chart(name, [row for row in rows if row["arm"] == name]))
            section.findings += _finding(name, rows)
            if len(events) >= self.settings.replay_events:
                section.notes.append(f"{name}: the replay ends after {len(events):,} events (bounded time and memory).")
        section.summary = {"hit_rate": rows}
        section.tables.append(records("hit_curves", "Hits by arm, policy and residency", rows, COLUMNS))
        return section

    def _curve(self, arm: str, events: list[Event], section: Section, advance: Advance) -> list[dict[str, Any]]:
        rows = []
        for residency in self.settings.residencies:
            slots = int(self.shape.total * residency)
            if slots < max(self.shape.top_k):
                note = f"{residency:.0%} residency holds {slots} experts, fewer than one layer chooses: left out."
                section.notes += [note] if note not in section.notes else []
                continue
            pieces = split_events(events, slots)
            for policy in (*CAUSAL, "belady"):
                done = _replay(policy, pieces, slots)
                advance(len(events))
                uses = done.hits + done.misses
                values = (arm, policy, residency, slots, len(pieces), uses, done.hits, done.hits / uses)
                rows.append(dict(zip(COLUMNS, values, strict=True)))
        return rows


def prompt_events(prompt: Prompt, keys: Keys, *, decode_only: bool) -> list[Event]:
    """Events of one prompt in execution order: every decode token alone, prefill tokens by pass."""
    events = []
    for token in range(prompt.tokens):
        if prompt.decode[token]:
            events += [keys.event(layer, chosen) for layer, chosen in enumerate(prompt.experts[token].tolist())]
        elif not decode_only and (token == 0 or prompt.passes[token] != prompt.passes[token - 1]):
            together = prompt.experts[~prompt.decode & (prompt.passes == prompt.passes[token])]
            events += [keys.event(n, np.unique(together[:, n]).tolist()) for n in range(together.shape[1])]
    return events


def _replay(policy: str, events: list[Event], slots: int) -> Replay:
    replay = Replay(Belady(events) if policy == "belady" else POLICIES.load(policy)(), slots)
    for event in events:
        replay.run(event)
    return replay


def _chart(arm: str, rows: list[dict[str, Any]]) -> Lines:
    series = []
    for policy in (*CAUSAL, "belady"):
        mine = [row for row in rows if row["policy"] == policy]
        x, y = [100 * row["residency"] for row in mine], numbers(row["hit_rate"] for row in mine)
        series.append(Series(policy, x, y, dashed=policy == "belady"))
    name = "hit_curve_" + arm.replace(" ", "_")
    return Lines(name, f"Hit rate, {arm}", "residency, % of all experts", "hit rate", series)


def _finding(arm: str, rows: list[dict[str, Any]]) -> list[str]:
    near = [row for row in rows if row["arm"] == arm and row["residency"] == 0.25]
    if not near:
        return []
    rates = ", ".join(f"{row['policy']} {row['hit_rate']:.3f}" for row in near)
    return [f"At 25 % residency ({arm}): {rates}."]
