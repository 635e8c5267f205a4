"""The dashboard without a browser: counters are the run's own, brakes brake, slow readers wait alone."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from foregate.cli import dashboard as command
from foregate.cli import main as cli
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.errors import ConfigError
from foregate.server.dashboard.board import Board
from foregate.server.dashboard.channel import Channel
from foregate.server.dashboard.serve import application, bind, is_loopback, server
from foregate.server.dashboard.session import BusyError, Session

Tiny = Callable[[str], Path]
PROMPT = "one two three four five six seven eight nine ten"


EVERY = pytest.mark.parametrize("engine", ["stale-gate", "random", "none"], indirect=True)


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[Engine]:
    predictor = getattr(request, "param", "stale-gate")
    prefetch = "auto" if predictor == "none" else "2"
    model = str(tiny("qwen3_moe"))
    config = RunConfig(model=model, memory_budget="50%", predictor=predictor, prefetch=prefetch, reader_threads=2)
    with Engine(config) as built:
        yield built


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    made = Session(engine)
    yield made
    made.close()


@contextmanager
def served(session: Session, **options: Any) -> Iterator[tuple[str, int]]:
    """A real server on a free port."""
    with bind("127.0.0.1", 0, allow_remote=False) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        running = server(application(session, **options))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[:2]
        finally:
            running.should_exit = True
            thread.join()


def ask(
    address: tuple[str, int], method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection(*address, timeout=60)
    if isinstance(body, dict):
        body, headers = json.dumps(body), {"Content-Type": "application/json"} | headers
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, dict(answer.getheaders())


def until(true: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def agree(totals: dict[str, Any], report: dict[str, Any]) -> None:
    """Every figure of the page is the one of the run's own JSON."""
    for name in ("expert_cache", "read_bytes", "prefetch", "completion_tokens"):
        assert totals[name] == report[name], name
    for name in ("stall_s", "ttft_s", "tpot_s"):
        assert totals[name] == pytest.approx(report[name], abs=1e-4), name


# Counters


@EVERY
def test_counters_are_those_of_the_run(session: Session) -> None:
    for tokens in (12, 1, 7):
        session.start(PROMPT, SamplingConfig(max_new_tokens=tokens))
        until(lambda: not session.running)
        assert session.report is not None
        agree(session.board.snapshot()["totals"], session.report)


@EVERY
def test_counters_of_a_run_that_was_stopped_include_what_its_end_cancelled(session: Session) -> None:
    session.start(PROMPT, SamplingConfig(max_new_tokens=30), paused=True)
    for made in (1, 2, 3):
        session.step()
        until(lambda made=made: len(session.board.snapshot()["frames"]) == made)
    session.stop()
    until(lambda: not session.running)
    assert session.report is not None
    assert session.report["completion_tokens"] == 3
    agree(session.board.snapshot()["totals"], session.report)


@EVERY
def test_the_map_is_the_cache(session: Session, engine: Engine) -> None:
    session.start(PROMPT, SamplingConfig(max_new_tokens=9))
    until(lambda: not session.running)
    shown = session.board.snapshot()
    experts = engine.spec.experts_per_layer
    cells = {(n, e): n * experts[0] + e for n in range(len(experts)) for e in range(experts[n])}
    assert {key for key, cell in cells.items() if shown["map"][cell] == "1"} == set(engine.cache.resident)
    uses = sum(what < 4 for frame in shown["frames"] for _, what in frame["marks"])
    assert sum(shown["heat"]) == uses == sum(shown["totals"]["expert_cache"][name] for name in ("hits", "misses"))


@EVERY
def test_layer_times_stay_within_the_token(session: Session) -> None:
    session.start(PROMPT, SamplingConfig(max_new_tokens=5))
    until(lambda: not session.running)
    for frame in session.board.snapshot()["frames"]:
        spent = sum(sum(layer) for layer in frame["layers"]) / 1e6
        assert 0 < spent <= frame["wall_s"]


# Brakes


def test_pause_step_resume(session: Session) -> None:
    def made() -> int:
        return len(session.board.snapshot()["frames"])

    session.start(PROMPT, SamplingConfig(max_new_tokens=6), paused=True)
    time.sleep(0.2)
    assert made() == 0
    session.step()
    until(lambda: made() == 1)
    time.sleep(0.2)
    assert (made(), session.board.snapshot()["status"]["state"]) == (1, "paused")
    with pytest.raises(BusyError, match="stop it first"):
        session.start(PROMPT, SamplingConfig(max_new_tokens=1))
    session.resume()
    until(lambda: not session.running)
    assert made() == 6
    with pytest.raises(BusyError, match="no run is going on"):
        session.pause()


def test_watching_changes_no_token(session: Session, engine: Engine) -> None:
    sampling = SamplingConfig(max_new_tokens=8)
    session.start(PROMPT, sampling)
    until(lambda: not session.running)
    watched = [frame["token_id"] for frame in session.board.snapshot()["frames"]]
    session.close()
    assert [step.token_id for step in engine.stream(engine.encode(PROMPT), sampling)] == watched


# Slow browsers


def test_a_full_channel_is_emptied_and_gets_a_snapshot() -> None:
    async def scene() -> None:
        board, channel = Board([2], {}), Channel(asyncio.get_running_loop(), limit=3)
        board.join(channel)
        assert [json.loads(m)["type"] for m in board.take(channel)] == ["snapshot"]
        for _ in range(3):
            board.say("running")
        assert [json.loads(m)["type"] for m in board.take(channel)] == ["status"] * 3
        for _ in range(5):
            board.say("paused")
        assert [json.loads(m)["type"] for m in board.take(channel)] == ["snapshot"]
        assert channel.overflows == 1
        board.say("idle")
        assert len(board.take(channel)) == 1

    asyncio.run(scene())


def test_a_browser_that_does_not_read_slows_nobody_and_catches_up(session: Session) -> None:
    """Its socket fills, its queue overflows; the run goes on; when it reads again it gets a snapshot of the end."""
    sampling = SamplingConfig(max_new_tokens=50)

    with served(session, limit=4) as address, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(60)
        slow.connect(address)
        slow.sendall(b"GET /events HTTP/1.0\r\nHost: localhost\r\n\r\n")
        until(lambda: session.board.browsers == 1)
        [channel] = session.board._channels
        while not channel.overflows:
            session.start(PROMPT, sampling)
            until(lambda: not session.running)  # a sender that waited for the reader would never come back
        totals, received = session.board.snapshot()["totals"], b""
        while True:
            received += slow.recv(1 << 16)
            messages = [json.loads(part[6:]) for part in received.split(b"\n\n")[:-1] if part.startswith(b"data: ")]
            if messages and messages[-1]["type"] == "snapshot" and messages[-1]["totals"] == totals:
                break


# Over HTTP


def test_events_state_report_and_commands(session: Session) -> None:
    with served(session) as address:
        body = {"prompt": PROMPT, "max_new_tokens": 4, "paused": True}
        assert ask(address, "POST", "/start", body)[0] == 202
        assert ask(address, "POST", "/start", body)[:2] == (409, '{"detail":"a run is going on: stop it first"}')
        assert ask(address, "POST", "/resume", {})[0] == 202
        until(lambda: not session.running)
        report = json.loads(ask(address, "GET", "/report")[1])
        state = json.loads(ask(address, "GET", "/state")[1])
        agree(state["totals"], report)
        assert "".join(state["text"]) == report["text"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/start", {"prompt": "a", "speed": 3}, 422, "speed"),
        ("/start", {"prompt": "a", "max_new_tokens": 0}, 400, "max new tokens 0"),
        ("/start", {"prompt": ""}, 400, "empty"),
        ("/pause", {}, 409, "no run is going on"),
        ("/step", {"n": 2}, 422, "n"),
        ("/nowhere", {}, 404, "Not Found"),
    ],
)
def test_wrong_requests_are_refused_with_a_reason(
    session: Session, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    with served(session) as address:
        answered, text, _ = ask(address, "POST", path, body)
    assert answered == status
    assert words in text


def test_other_sites_cannot_command_it(session: Session) -> None:
    """A form of another site is no JSON; a name that was re-bound to loopback is no known host."""
    with served(session) as address:
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            assert ask(address, "POST", "/start", '{"prompt": "a"}', **{"Content-Type": kind})[0] == 422
        assert ask(address, "GET", "/state", Host="evil.example")[0] == 400
        assert ask(address, "GET", "/state", Host="localhost:8080")[0] == 200
    assert not session.running


# The page


def page(name: str) -> bytes:
    return files("foregate.server.dashboard").joinpath("page", name).read_bytes()


def test_page_loads_nothing_from_elsewhere_and_says_so(session: Session) -> None:
    with served(session) as address:
        status, text, headers = ask(address, "GET", "/")
        assert status == 200
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        for name in ("app.js", "app.css", "icon.svg"):
            assert name in text or name == "icon.svg"
            assert ask(address, "GET", f"/{name}")[0] == 200
    for name in ("index.html", "app.js", "app.css"):
        outside = page(name).replace(b"http://www.w3.org/", b"")  # names of XML languages, never loaded
        assert b"http://" not in outside
        assert b"https://" not in outside


def test_page_is_small_and_built_from_the_sources_beside_it() -> None:
    assert sum(len(page(name)) for name in ("index.html", "app.js", "app.css", "icon.svg")) < 150_000
    sources = sorted((Path(__file__).parents[1] / "frontend" / "src").iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    assert f"Sources {digest}." in page("app.js")[:200].decode(), "run: make frontend"


# The command


def test_addresses_that_others_reach_need_a_flag() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "10.1.2.3")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 can be reached from other machines.*--allow-remote"):
        bind("0.0.0.0", 0, allow_remote=False)
    bind("0.0.0.0", 0, allow_remote=True).close()


def test_a_taken_port_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            bind("127.0.0.1", port, allow_remote=False)


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["foregate", "dashboard"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    assert "pip install 'foregate[dashboard]'" in capsys.readouterr().err
