"""Hit rate of LRU, LFU, aged LFU, echo and Belady over residency, by event-atomic replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.belady import Belady
from foregate.analysis.chart import Lines, Series, numbers
from foregate.analysis.prompt import Prompt, Shape
from foregate.analysis.replay import Event, Keys, Replay, split_events
from foregate.analysis.section import Section
from foregate.analysis.settings import Settings
from foregate.analysis.table import records
from foregate.analysis.worths import ECHO, Worths
from foregate.experts.echo import Echo
from foregate.experts.policy import POLICIES

Advance = Callable[[int], None]
CAUSAL = ("lru", "lfu", "lfru", ECHO)
COLUMNS = ("arm", "policy", "residency", "slots", "events", "uses", "hits", "hit_rate")
METHOD = (
    "One global pool, cold at first, kept from prompt to prompt, no prefetch. An event is what a layer needs at once: "
    "the k experts of a decode token, or the union of a prefill pass; an expert that is resident when its event "
    "begins is a hit. A union above the pool is streamed through it in pieces. Belady (1966) is exact for these "
    "events. Echo, the engine's default, is told every routing decision of its arm, as in the engine, router scores "
    "included where the trace has them. Residency is slots over all experts."
)


class HitCurves:
    """Holds the events of the replayed prompts: at most ``replay_events`` of each arm, 8 bytes a use and more, and
    what ``echo`` knew at each, 4 bytes an expert of the layer."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.shape, self.settings = shape, settings
        self._keys = Keys(shape)
        self._arms: dict[str, list[Event]] = {"decode": [], "prefill and decode": []}
        self._worths: dict[str, list[NDArray[np.float32]]] = {arm: [] for arm in self._arms}
        self._told = {arm: Worths() for arm in self._arms}
        self._prompts = 0

    def add(self, prompt: Prompt) -> None:
        if not prompt.replayed:
            return
        self._prompts += 1
        for arm, events in self._arms.items():
            room = self.settings.replay_events - len(events)
            found = prompt_events(prompt, self._keys, decode_only=arm == "decode")[:room]
            events.extend(found)
            self._worths[arm] += self._learned(prompt, arm, len(found))

    def _learned(self, prompt: Prompt, arm: str, count: int) -> list[NDArray[np.float32]]:
        """What echo knows at each of the first ``count`` events of ``prompt``."""
        if self.settings.phase == "decode" and arm != "decode":
            return []  # an arm that is not shown
        out: list[NDArray[np.float32]] = []
        for rows in passes(prompt, decode_only=arm == "decode"):
            for layer, size in enumerate(self.shape.experts_per_layer):
                if len(out) == count:
                    return out
                scores = None if prompt.scores is None else prompt.scores[rows, layer, :size]
                out.append(self._told[arm].of(layer, prompt.experts[rows, layer], scores))
        return out

    @property
    def work(self) -> int:
        """Events that ``finish`` replays, over all policies and residencies."""
        return len(self.settings.residencies) * (len(CAUSAL) + 1) * sum(len(events) for events in self._arms.values())

    def finish(self, advance: Advance = lambda events: None) -> Section:
        """What was found; ``advance`` is told the events replayed."""
        arm = f"cache-only, all experts, {self._prompts:,} prompts; phase and residency with every number"
        section = Section("cache", "Hit curves", arm, METHOD)
        rows: list[dict[str, Any]] = []
        for arm, events in self._arms.items():
            name = arm
            if self.settings.phase == "prefill" and name != "decode":
                name = "prefill"
            if not events or (self.settings.phase == "decode" and name != "decode"):
                if name == "decode" and self.settings.phase != "prefill":
                    section.notes.append("No decode tokens in the replayed prompts: no decode hit curve.")
                continue
            rows += self._curve(name, events, self._worths[arm], section, advance)
            if not self._told[arm].scored:
                section.notes.append(f"{name}: echo on choices alone, for want of router scores (trace with --scores).")
            section.charts.append(_chart(name, [row for row in rows if row["arm"] == name]))
            section.findings += _finding(name, rows)
            if len(events) >= self.settings.replay_events:
                section.notes.append(f"{name}: the replay ends after {len(events):,} events (bounded time and memory).")
        section.summary = {"hit_rate": rows}
        section.tables.append(records("hit_curves", "Hits by arm, policy and residency", rows, COLUMNS))
        return section

    def _curve(
        self, arm: str, events: list[Event], worths: list[NDArray[np.float32]], section: Section, advance: Advance
    ) -> list[dict[str, Any]]:
        rows = []
        for residency in self.settings.residencies:
            slots = int(self.shape.total * residency)
            if slots < max(self.shape.top_k):
                note = f"{residency:.0%} residency holds {slots} experts, fewer than one layer chooses: left out."
                section.notes += [note] if note not in section.notes else []
                continue
            pieces = split_events(events, slots)
            for policy in (*CAUSAL, "belady"):
                if policy == ECHO:
                    done = _replay_echo(events, worths, self.shape.layers, slots)
                else:
                    done = _replay(policy, pieces, slots)
                advance(len(events))
                uses = done.hits + done.misses
                values = (arm, policy, residency, slots, len(pieces), uses, done.hits, done.hits / uses)
                rows.append(dict(zip(COLUMNS, values, strict=True)))
        return rows


def prompt_events(prompt: Prompt, keys: Keys, *, decode_only: bool) -> list[Event]:
    """Events of one prompt in execution order: every decode token alone, prefill tokens by pass."""
    events = []
    for rows in passes(prompt, decode_only=decode_only):
        if prompt.decode[rows[0]]:
            events += [keys.event(layer, chosen) for layer, chosen in enumerate(prompt.experts[rows[0]].tolist())]
        else:
            together = prompt.experts[rows]
            events += [keys.event(n, np.unique(together[:, n]).tolist()) for n in range(together.shape[1])]
    return events


def passes(prompt: Prompt, *, decode_only: bool) -> Iterator[NDArray[np.intp]]:
    """Tokens of every forward pass, in execution order."""
    for token in range(prompt.tokens):
        if prompt.decode[token]:
            yield np.array([token])
        elif not decode_only and (token == 0 or prompt.passes[token] != prompt.passes[token - 1]):
            yield np.flatnonzero(~prompt.decode & (prompt.passes == prompt.passes[token]))


def _replay_echo(events: list[Event], worths: list[NDArray[np.float32]], layers: int, slots: int) -> Replay:
    rule = Echo()
    replay = Replay(rule, slots)
    for number, (event, worth) in enumerate(zip(events, worths, strict=True)):
        rule.tell(number % layers, worth)
        for piece in split_events([event], slots):
            replay.run(piece)
    return replay


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
