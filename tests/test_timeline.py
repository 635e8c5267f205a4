"""Timeline files: well-formed, nested, arrows matched, and their sums those of the run's own report."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foregate.cli import main as cli
from foregate.errors import ConfigError
from foregate.timeline import tracks
from foregate.timeline.figure import draw, tokens_of
from foregate.timeline.reading import Timeline, read_timeline

PROMPT = "one two three four five six seven eight nine ten"


def foregate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["foregate", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


@pytest.fixture(scope="module")
def file(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The timeline of a real run with prefetching, whose prompt is long enough to be streamed."""
    path = tmp_path_factory.mktemp("timeline") / "run.json"
    with pytest.MonkeyPatch.context() as patch:
        code = foregate(
            patch, "run", tiny("qwen3_moe"), "-p", PROMPT, "--budget", "50%", "--predictor", "random",
            "--prefetch", 2, "--reader-threads", 2, "--max-new-tokens", 10, "--trace-events", path, "--json",
        )  # fmt: skip
    assert code == 0
    return path


@pytest.fixture(scope="module")
def events(file: Path) -> list[dict[str, Any]]:
    return list(json.loads(file.read_text())["traceEvents"])


@pytest.fixture(scope="module")
def report(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())["otherData"]["report"])


def test_every_event_has_what_the_format_demands(events: list[dict[str, Any]]) -> None:
    assert {event["ph"] for event in events} >= {"M", "X", "C", "i", "s", "t", "f"}
    for event in events:
        assert {"ph", "pid", "tid", "name"} <= event.keys()
        assert event["ph"] == "M" or event["ts"] >= 0
        assert event["ph"] != "X" or event["dur"] >= 0
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    assert {event["tid"] for event in events if event["ph"] == "X"} <= named


def test_slices_of_a_track_nest_or_are_disjoint(file: Path) -> None:
    """Perfetto drops a slice that begins inside another and ends after it."""
    timeline = read_timeline(file)
    for track in {piece.track for piece in timeline.slices}:
        around: list[float] = []
        for piece in timeline.on(track):
            while around and around[-1] <= piece.began:
                around.pop()
            assert not around or piece.ended <= around[-1] + 1e-3, piece
            around.append(piece.ended)


def test_sums_are_those_of_the_report(file: Path, report: dict[str, Any]) -> None:
    timeline = read_timeline(file)
    reads: dict[str, int] = defaultdict(int)
    for piece in timeline.slices:
        reads[piece.name] += piece.args.get("bytes", 0)
    streamed = report["prefill"]["read_bytes"] - sum(
        piece.args["bytes"]
        for piece in timeline.slices
        if piece.name == tracks.DEMAND_READ and piece.ended <= timeline.on(tracks.TOKENS)[0].ended
    )
    assert reads[tracks.DEMAND_READ] + streamed == report["read_bytes"]["demand"]
    assert reads[tracks.SPECULATIVE_READ] - streamed == report["read_bytes"]["prefetch"]
    waits = sum(piece.ended - piece.began for piece in timeline.on(tracks.WAITS)) / 1e6
    assert waits == pytest.approx(report["stall_s"], abs=1e-4)
    needed = report["expert_cache"]["hits"] + report["expert_cache"]["misses"]
    assert sum(piece.name == "expert" for piece in timeline.slices) == needed
    assert len(timeline.on(tracks.TOKENS)) == report["completion_tokens"] == 10


def test_arrows_are_matched_and_each_end_lies_in_a_slice(file: Path, report: dict[str, Any]) -> None:
    timeline = read_timeline(file)
    used = report["prefetch"]["used"]
    assert 0 < len(timeline.arrows) == used
    for arrow in timeline.arrows:
        assert len(arrow.points) == 3
        assert [at for _, at in arrow.points] == sorted(at for _, at in arrow.points)
        (asking, _), _, (computing, _) = arrow.points
        assert (asking, computing) == (tracks.PREDICTIONS, tracks.COMPUTE)
        for track, at in arrow.points:
            assert any(piece.began - 1e-3 <= at <= piece.ended + 1e-3 for piece in timeline.on(track)), (track, at)


def test_flow_events_come_in_order(events: list[dict[str, Any]]) -> None:
    flows: dict[int, str] = defaultdict(str)
    for event in events:
        if event["ph"] in "stf":
            flows[event["id"]] += event["ph"]
    assert Counter(flows.values()).keys() == {"stf"}


def test_memory_counter_never_exceeds_the_budget(events: list[dict[str, Any]], report: dict[str, Any]) -> None:
    counters = [event["args"] for event in events if event["ph"] == "C"]
    held = [sum(series.values()) for series in counters]
    assert 0 < max(held) <= report["budget_bytes"]
    assert max(series["staged"] for series in counters) > 0


def test_overlap_of_a_known_timeline() -> None:
    """Two readers over one wait: reading counts once, what was waited for is not hidden."""
    from foregate.timeline.reading import Slice

    known = Timeline(
        [
            Slice(tracks.READERS, tracks.DEMAND_READ, 0, 4e6, {}),
            Slice(tracks.READERS + 1, tracks.DEMAND_READ, 2e6, 6e6, {}),
            Slice(tracks.WAITS, tracks.DEMAND_WAIT, 5e6, 9e6, {}),
        ]
    )
    assert known.overlap(0, 10e6) == {"window_s": 10, "reading_s": 6, "waiting_s": 4, "hidden_s": 5}
    assert known.overlap(3e6, 5.5e6) == {"window_s": 2.5, "reading_s": 2.5, "waiting_s": 0.5, "hidden_s": 2}


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_figure_is_drawn_from_the_file(
    file: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / f"figure{suffix}"
    assert foregate(monkeypatch, "timeline", file, "--out", figure, "--token", 3, "--to", 4, "--json") == 0
    times = json.loads(capsys.readouterr().out)
    assert (times["first_token"], times["last_token"]) == (3, 4)
    assert times["window_s"] > 0
    assert times["hidden_s"] <= times["reading_s"]
    assert figure.stat().st_size > 1000
    again = tmp_path / f"again{suffix}"
    timeline = read_timeline(file)
    draw(timeline, tokens_of(timeline, 3, 4), again)
    assert again.read_bytes() == figure.read_bytes()


def test_default_token_is_a_decoded_one(file: Path) -> None:
    [token] = tokens_of(read_timeline(file), None, None)
    assert token.name == "decode"


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"traceEvents": [', "no whole timeline"), ("[]", "no whole timeline"), ('{"traceEvents": []}', "no whole")],
)
def test_a_broken_file_is_a_clear_error(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_timeline(path)


def test_wrong_wishes_are_one_line(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in [
        ((file, "--out", tmp_path / "x.gif"), "must end in one of .svg"),
        ((file, "--out", tmp_path / "x.svg", "--token", 99), "has 10 tokens"),
        ((file, "--out", tmp_path / "x.svg", "--to", 2), "needs a --token"),
        ((tmp_path / "none.json", "--out", tmp_path / "x.svg"), "cannot read the timeline"),
    ]:
        assert foregate(monkeypatch, "timeline", *arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
        assert error.count("\n") == 1


def test_an_unwritable_path_is_one_line_and_no_run(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none" / "run.json"
    assert foregate(monkeypatch, "run", tiny("qwen3_moe"), "-p", "a", "--trace-events", path) == 1
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert "cannot write the timeline" in error
