"""The dashboard in a real browser: it loads, moves with the run, ends at its figures, and obeys the keyboard."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from foregate.config import RunConfig
from foregate.engine.engine import Engine
from foregate.server.dashboard.serve import application, bind, server
from foregate.server.dashboard.session import Session
from foregate.testing.tiny import build

pytest.importorskip("selenium")
PROMPT = "Question: Natalia sold 48 clips in April and half as many in May. How many clips did she sell in all?"


class Page:
    """The dashboard of one session in the browser, by the ids of its elements."""

    def __init__(self, browser: Any, session: Session, address: tuple[str, int]) -> None:
        self.browser = browser
        self.session = session
        browser.get_log("browser")
        browser.get(f"http://{address[0]}:{address[1]}/")
        self.until(lambda: self.text("tokens"))

    def find(self, name: str) -> Any:
        return self.browser.find_element("id", name)

    def text(self, name: str) -> str:
        found = self.browser.find_elements("id", name)
        return str(found[0].text) if found else ""

    def click(self, name: str) -> None:
        self.until(self.find(name).is_enabled)
        self.find(name).click()

    def set(self, name: str, value: object) -> None:
        self.find(name).clear()
        self.find(name).send_keys(str(value))

    def until(self, true: Callable[[], Any], seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"waited in vain; status: {self.text('status')}"
            time.sleep(0.05)

    def run(self, tokens: int) -> None:
        self.set("max-tokens", tokens)
        self.click("start")
        self.until(lambda: self.text("status") == f"finished: {tokens} tokens" and not self.session.running)

    def drawn(self) -> None:
        """Wait until what the last message changed is on the screen: the next frame but one."""
        self.browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def pixels(self) -> str:
        return str(self.browser.execute_script("return document.getElementById('map').toDataURL()"))

    def focused(self) -> str:
        return str(self.browser.switch_to.active_element.get_attribute("id"))

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def picture(self, path: Path, theme: str = "light", motion: str = "no-preference") -> None:
        features = [
            {"name": "prefers-color-scheme", "value": theme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        time.sleep(0.3)
        assert self.browser.save_screenshot(str(path))

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]


def opened(browser: Any, engine: Engine) -> Iterator[Page]:
    session = Session(engine)
    listening = bind("127.0.0.1", 0, allow_remote=False)
    running = server(application(session))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield Page(browser, session, listening.getsockname()[:2])
        browser.get("about:blank")
    finally:
        running.should_exit = True
        thread.join()
        session.close()
        listening.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(RunConfig(predictor="stale-gate", prefetch="2", reader_threads=2)) as built:
        yield built


@pytest.fixture
def page(browser: Any, engine: Engine) -> Iterator[Page]:
    yield from opened(browser, engine)


def test_counters_at_the_end_are_the_runs_own(page: Page, screenshots: Path) -> None:
    """And the map has moved, in both themes, and the console is silent."""
    before = page.pixels()
    page.run(24)
    assert page.pixels() != before
    report = page.session.report
    assert report is not None
    shown = {name: int(page.text(name)) for name in ("tokens", "hits", "misses", "evictions")}
    assert shown == {"tokens": 24, **report["expert_cache"]}
    assert {name: int(page.text(f"prefetch-{name}")) for name in report["prefetch"]} == report["prefetch"]
    assert page.text("demand-bytes") == f"{report['read_bytes']['demand'] / 1e6:.3g} MB"
    assert page.text("stall").startswith(f"{report['stall_s']:.3f} s")
    assert page.find("text").get_attribute("textContent") == PROMPT + report["text"]
    assert page.text("held") == f"{len(page.session._engine.cache.resident) * 98304 / 1e6:.3g} MB"
    for theme in ("light", "dark"):
        page.picture(screenshots / f"dashboard-{theme}.png", theme)
    assert page.complaints() == []


def test_map_and_counters_move_while_it_generates(page: Page) -> None:
    page.set("max-tokens", 200)
    page.click("start")
    page.until(lambda: int(page.text("tokens")) >= 2)
    first = page.text("hits"), page.pixels()
    page.until(lambda: page.text("hits") != first[0] and page.pixels() != first[1])
    assert page.session.running
    page.click("stop")
    page.until(lambda: page.text("status").startswith("finished"))


def test_pause_step_and_scrub_back(page: Page, screenshots: Path) -> None:
    page.set("max-tokens", 500)
    page.click("start")
    page.until(lambda: int(page.text("tokens")) >= 3)
    page.click("pause")
    page.until(lambda: page.text("status").startswith("paused"))
    time.sleep(0.5)  # the token in hand
    made = int(page.text("tokens"))
    page.click("step")
    page.until(lambda: int(page.text("tokens")) == made + 1)
    time.sleep(0.5)
    assert int(page.text("tokens")) == made + 1
    live = page.pixels()

    from selenium.webdriver.common.keys import Keys

    page.find("scrub").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    page.until(lambda: page.text("at") == f"token {made - 2}")
    frame = page.session.board.snapshot()["frames"][made - 2]
    assert int(page.text("hits")) == frame["totals"]["expert_cache"]["hits"]
    assert page.text("map-summary").startswith(f"{frame['map'].count('1')} of 512 experts")
    assert page.find("scrub").get_attribute("aria-valuetext") == f"token {made - 2}: {frame['text']}"
    assert page.pixels() != live
    page.picture(screenshots / "dashboard-scrubbed.png")
    page.click("live")
    page.until(lambda: page.text("at") == f"token {made}")
    page.click("stop")
    page.until(lambda: page.text("status").startswith("finished"))
    assert page.complaints() == []


def test_everything_by_keyboard(page: Page) -> None:
    """Focus goes in reading order; keys start, pause, step, walk the map."""
    from selenium.webdriver.common.keys import Keys

    order = []
    while page.focused() != "map":
        page.press(Keys.TAB)
        order.append(page.focused())
        assert len(order) < 20, order
    assert order == ["prompt", "max-tokens", "start", "text", "map"]
    page.press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    page.until(lambda: page.text("cell").startswith("Layer 1, expert 2: "))
    page.press(Keys.END, Keys.PAGE_DOWN)
    page.until(lambda: page.text("cell").startswith("Layer 15, expert 31: "))
    page.find("start").send_keys(Keys.ENTER)
    page.until(lambda: page.text("status") == "generating")
    page.browser.execute_script("document.activeElement.blur()")
    page.press(Keys.SPACE)
    page.until(lambda: page.text("status").startswith("paused"))
    time.sleep(0.5)
    made = len(page.session.board.snapshot()["frames"])
    page.press(".")
    page.until(lambda: len(page.session.board.snapshot()["frames"]) == made + 1)
    page.find("stop").send_keys(Keys.SPACE)
    page.until(lambda: page.text("status").startswith("finished"))


def test_screen_readers_find_names_and_news(page: Page) -> None:
    """Every control has a name in the browser's own accessibility tree, and what changes is announced."""
    page.browser.execute_cdp_cmd("Accessibility.enable", {})
    tree = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "textbox", "spinbutton", "slider", "application", "image", "meter", "table", "region"}
    nodes = [node for node in tree if node.get("role", {}).get("value") in roles and not node.get("ignored")]
    assert roles - {"image", "region"} <= {node["role"]["value"] for node in nodes}
    nameless = [(node["role"], node.get("properties")) for node in nodes if not node.get("name", {}).get("value")]
    assert nameless == []
    assert page.find("status").get_attribute("role") == page.find("cell").get_attribute("role") == "status"
    page.set("prompt", " ")
    page.click("start")
    page.until(lambda: page.text("problem") == "the prompt is empty")
    assert page.find("problem").get_attribute("role") == "alert"


def test_reduced_motion_stands_still(page: Page, screenshots: Path) -> None:
    """Without motion a finished token's picture does not change any more."""
    page.picture(screenshots / "dashboard-still.png", motion="reduce")
    page.run(3)
    page.drawn()
    pictures = set()
    for _ in range(5):
        pictures.add(page.pixels())
        time.sleep(0.05)
    assert len(pictures) == 1


def test_a_page_that_comes_late_or_again_shows_the_same(page: Page) -> None:
    page.run(5)
    shown = page.text("text"), page.text("hits"), page.text("map-summary")
    page.browser.refresh()
    page.until(lambda: page.text("tokens") == "5")
    assert (page.text("text"), page.text("hits"), page.text("map-summary")) == shown


def test_a_failed_run_says_why(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("the disk is gone")

    monkeypatch.setattr(page.session._engine, "_run", broken)
    page.click("start")
    page.until(lambda: page.text("status") == "failed")
    assert page.text("problem") == "ValueError: the disk is gone"


def test_a_map_of_48_by_128(browser: Any, tmp_path: Path, screenshots: Path) -> None:
    """The shape of Qwen3-30B-A3B, with tiny experts: all of it is drawn, in both themes."""
    model = build(
        "qwen3_moe", tmp_path / "wide", num_hidden_layers=48, num_experts=128, num_experts_per_tok=8, mlp_only_layers=[]
    )
    config = RunConfig(model=str(model), predictor="stale-gate", prefetch="2", reader_threads=2)
    with Engine(config) as engine:
        pages = opened(browser, engine)
        page = next(pages)
        page.run(3)
        assert "of 6144 experts in memory" in page.text("map-summary")
        for theme in ("light", "dark"):
            page.picture(screenshots / f"dashboard-48x128-{theme}.png", theme)
        assert page.complaints() == []
        assert next(pages, None) is None


def test_the_page_asks_for_nothing_outside(page: Page) -> None:
    """Every resource that the browser loaded comes from the server itself."""
    names = page.browser.execute_script("return performance.getEntriesByType('resource').map((r) => r.name)")
    port = page.browser.current_url.split(":")[2].strip("/")
    assert {name.rsplit("/", 1)[1] for name in names} >= {"app.js", "app.css"}
    assert all(name.startswith(f"http://127.0.0.1:{port}/") for name in names)
    with socket.create_connection(("127.0.0.1", int(port))):
        pass
