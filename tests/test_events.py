"""Events: who listens sees exactly what the counters say, and changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, get_args

import pytest

from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.events import (
    SILENCE,
    Event,
    EventHub,
    EventSorter,
    ExpertMoved,
    ExpertUsed,
    Fate,
    Move,
    Part,
    PassBegan,
    PredictionMade,
    ReadEnded,
    ReadSubmitted,
    SpeculationEnded,
    TimeSpent,
    TokenMade,
    Use,
)
from foregate.types import StepStats

E = TypeVar("E")


class Ear:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture(scope="module", params=["random", "stale-gate", "none", "oracle"])
def heard(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Iterator[tuple[Ear, Engine, list[int]]]:
    """A run that is listened to, its engine, and the tokens of a run that is not."""
    prefetch = "auto" if request.param == "none" else "2"
    config = RunConfig(
        model=str(tiny("qwen3_moe")), memory_budget="50%", predictor=request.param, prefetch=prefetch, reader_threads=2
    )
    sampling = SamplingConfig(max_new_tokens=12)
    ear = Ear()
    with Engine(config) as deaf, Engine(config) as engine:
        ids = deaf.encode("one two three four")
        silent = [step.token_id for step in deaf.stream(ids, sampling)]
        stop = engine.listen(ear)
        list(engine.stream(ids, sampling))
        stop()
        yield ear, engine, silent


def total(engine: Engine) -> StepStats:
    assert engine.report is not None
    summed = StepStats()
    for step in engine.report.steps:
        summed.add(step.stats)
    return summed


def test_listening_changes_no_token(heard: tuple[Ear, Engine, list[int]]) -> None:
    ear, _, silent = heard
    assert [event.step.token_id for event in ear.of(TokenMade)] == silent
    assert len(ear.of(PassBegan)) == len(silent)


def test_uses_and_fates_add_up_to_the_counters(heard: tuple[Ear, Engine, list[int]]) -> None:
    ear, engine, _ = heard
    stats = total(engine)
    uses = Counter(event.how for event in ear.of(ExpertUsed))
    assert (uses[Use.HIT] + uses[Use.STAGED_HIT], uses[Use.MISS] + uses[Use.LATE]) == (stats.hits, stats.misses)
    assert (uses[Use.LATE], uses[Use.STAGED_HIT] + uses[Use.LATE]) == (stats.late, stats.used)
    fates = Counter(event.fate for event in ear.of(SpeculationEnded))
    assert fates[Fate.USED] == stats.used
    assert fates[Fate.WASTED] == stats.wasted
    assert fates[Fate.CANCELLED] - fates[Fate.REVIVED] == stats.cancelled
    assert sum(event.speculative for event in ear.of(ReadSubmitted)) == stats.issued


def test_every_read_ends_once_with_its_bytes(heard: tuple[Ear, Engine, list[int]]) -> None:
    ear, engine, _ = heard
    submitted = Counter((event.key, event.speculative) for event in ear.of(ReadSubmitted))
    assert submitted == Counter((event.key, event.speculative) for event in ear.of(ReadEnded))
    stats = total(engine)
    for speculative, expected in ((False, stats.demand_bytes), (True, stats.prefetch_bytes)):
        ended = [event for event in ear.of(ReadEnded) if event.speculative is speculative]
        assert sum(span.nbytes for event in ended for span in event.spans) == expected
    spans = [span for event in ear.of(ReadEnded) for span in event.spans]
    assert {span.reader for span in spans} <= {0, 1}
    assert all(span.began <= span.ended for span in spans)


def test_waits_add_up_to_the_stall(heard: tuple[Ear, Engine, list[int]]) -> None:
    ear, engine, _ = heard
    waits = [event for event in ear.of(TimeSpent) if event.part is Part.WAIT]
    stats = total(engine)
    assert sum(w.ended - w.began for w in waits) / 1e9 == pytest.approx(stats.stall_s, abs=1e-5)
    assert sum(w.ended - w.began for w in waits if w.late) / 1e9 == pytest.approx(stats.late_stall_s, abs=1e-5)


def test_moves_leave_what_the_cache_holds(heard: tuple[Ear, Engine, list[int]]) -> None:
    """A map drawn from moves alone is the cache's own."""
    ear, engine, _ = heard
    place: dict[object, Move] = {}
    for event in ear.of(ExpertMoved):
        place[event.key] = event.move
    assert {k for k, move in place.items() if move in (Move.RESIDENT, Move.ADOPTED)} == set(engine.cache.resident)
    assert {k for k, move in place.items() if move is Move.STAGED} == set(engine.cache.staged)
    evicted = sum(event.move is Move.EVICTED for event in ear.of(ExpertMoved))
    assert evicted == total(engine).evictions


def test_every_layer_of_every_pass_has_its_parts(heard: tuple[Ear, Engine, list[int]]) -> None:
    ear, engine, silent = heard
    for part in (Part.ATTENTION, Part.ROUTING, Part.EXPERTS):
        layers = Counter(event.layer for event in ear.of(TimeSpent) if event.part is part)
        assert layers == dict.fromkeys(range(engine.spec.layers), len(silent)), part
    computed = [(e.layer, e.expert) for e in ear.of(TimeSpent) if e.part is Part.EXPERT]
    assert Counter(computed) == Counter(event.key for event in ear.of(ExpertUsed))


def test_predictions_are_told_before_their_reads(heard: tuple[Ear, Engine, list[int]]) -> None:
    ear, engine, _ = heard
    known: set[tuple[int, int]] = set()
    streamed = True
    for event in ear.events:
        if isinstance(event, TokenMade):
            streamed = False  # the prompt reads whole layers ahead, unpredicted
        elif isinstance(event, PredictionMade):
            known |= {(event.target % engine.spec.layers, e) for e in event.experts}
        elif isinstance(event, ReadSubmitted) and event.speculative and not streamed:
            assert event.key in known
    assert bool(known) == (engine.config.predictor != "none")


def test_a_listener_that_raises_is_dropped_and_the_text_comes_out(
    tiny: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def on_event(self, event: Event) -> None:
            raise ValueError("no ink")

    ear = Ear()
    with Engine(RunConfig(model=str(tiny("qwen3_moe")), memory_budget="50%")) as engine:
        engine.listen(Broken())
        engine.listen(ear)
        tokens = list(engine.stream(engine.encode("one two"), SamplingConfig(max_new_tokens=3)))
        assert len(tokens) == len(ear.of(TokenMade)) == 3
    assert caplog.text.count("listener Broken dropped: ValueError: no ink") == 1


def test_every_kind_of_event_has_its_own_method_in_a_sorter() -> None:
    """A new kind without one would end every listener at its first event; two kinds in one would mix them up."""
    heard: list[tuple[str, Event]] = []
    kinds = get_args(Event)
    methods = [name for name in vars(EventSorter) if not name.startswith("_") and name != "on_event"]
    body = {name: lambda _, event, name=name: heard.append((name, event)) for name in methods}
    sorter = type("Told", (EventSorter,), body)()
    given = [kind(*range(len(kind._fields))) for kind in kinds]
    for event in given:
        sorter.on_event(event)
    assert [event for _, event in heard] == given
    assert [name.replace("_", "") for name, _ in heard] == [kind.__name__.lower() for kind in kinds]
    assert len(methods) == len(kinds)


def test_the_silent_hub_refuses_listeners() -> None:
    with pytest.raises(TypeError, match="own hub"):
        SILENCE.add(Ear())
    assert not SILENCE.on


def test_removing_the_last_listener_switches_off() -> None:
    hub, ear = EventHub(), Ear()
    hub.add(ear)
    hub.remove(ear)
    hub.remove(ear)
    assert not hub.on
