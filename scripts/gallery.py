"""Makes docs/gallery/ and docs/gallery.md from the reference model: ``make gallery``, or ``scripts/gallery.py STEP…``.

A step makes some pictures and says what is seen in each; the sentence comes from the numbers or is checked against
them. To add one: write a function from a ``Bench`` to pictures and name it in STEPS. gallery.json remembers
the pictures of every step, so that one step can be made again without the others.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from foregate.analysis.captions import captions
from foregate.analysis.chart import Chart
from foregate.analysis.figures import draw
from foregate.analysis.interactive import flat
from foregate.analysis.study import Study, analyse
from foregate.trace.sample import SAMPLE

PROMPT = "Question: Natalia sold 48 clips in April and half as many in May. How many clips did she sell in all?"
DOCS = Path(__file__).parents[1] / "docs"
LARGEST = 150_000
"""Bytes of one picture."""
HEAD = """# Gallery

What Foregate shows of itself, on its own [reference model](reference-model.md). Made by `make gallery`; every sentence
is made from the numbers of its picture.
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """``file`` below docs/gallery/; ``sentence``: what is seen; ``command``: how to get it."""

    file: str
    title: str
    sentence: str
    command: str


@dataclass(frozen=True, slots=True)
class Bench:
    """``pictures``: where pictures go; ``scratch``: a directory that is deleted after the step."""

    pictures: Path
    scratch: Path


Step = Callable[[Bench], list[Picture]]

CHARTS = (
    "conditional",
    "affinity",
    "top1_by_hop_decode",
    "recall_k_by_hop_decode",
    "recall_k_on_lru_misses_at_25_residency_by_hop_decode",
    "recall_by_pair_decode",
    "entropy",
    "path_coverage",
    "overlap",
    "hit_curve_decode",
    "domain_matrix",
    "timing_decode",
)
"""Of the analysis of the shipped trace; timings if it has any."""


def routing(bench: Bench) -> list[Picture]:
    """Figures of ``foregate analyze`` on the shipped trace."""
    return _charts(bench, analyse([SAMPLE]), CHARTS, "", "foregate analyze sample --out report")


def budget(bench: Bench) -> list[Picture]:
    """Where the time goes when three quarters of the experts lie on disk: a fresh trace. Wants a quiet machine."""
    trace = bench.scratch / "trace"
    options = ["trace", "reference", "--dataset", "synthetic", "--limit", "6", "--max-new-tokens", "32", "--timings"]
    options += ["--memory-budget", "25%", "--out", str(trace)]
    foregate(*options)
    command = f"foregate {' '.join(options[:-1])} TRACE; foregate analyze TRACE --out report"
    return _charts(bench, analyse([trace]), ("timing_decode", "timing_prefill"), "budget_25_", command)


def report(bench: Bench) -> list[Picture]:
    """The page that ``foregate analyze`` writes, as Chromium shows it."""
    out = bench.scratch / "report"
    foregate("analyze", "sample", "--out", str(out), "--no-figures")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    page = (out / "report.html").read_text(encoding="utf-8")
    found = []
    for dark in (False, True):
        name = f"report_{'dark' if dark else 'light'}.png"
        screenshot((out / "report.html").as_uri(), bench.pictures / name, width=1180, height=900, dark=dark)
        sentence = (
            f"One file of {len(page) / 1e6:.1f} MB with {page.count('data-chart=')} interactive charts and "
            f"{len(summary['sections'])} sections over {summary['facts']['decisions']:,} routing decisions; it loads "
            "nothing from anywhere."
        )
        title = f"report.html, {'dark' if dark else 'light'}"
        found.append(Picture(name, title, sentence, "foregate analyze sample --out report"))
    return found


def timeline(bench: Bench) -> list[Picture]:
    """Copies under compute: one decoded token of ``foregate run --trace-events``. Wants a quiet machine."""
    from foregate.timeline.figure import draw as draw_tokens
    from foregate.timeline.figure import tokens_of
    from foregate.timeline.reading import read_timeline

    file = bench.scratch / "run.json"
    options = ["run", "reference", "--memory-budget", "25%", "--predictor", "stale-gate", "--prefetch", "2"]
    options += ["--reader-threads", "2", "--max-new-tokens", "60", "-p", PROMPT, "--trace-events"]
    foregate(*options, str(file))
    whole = read_timeline(file)
    [token] = tokens_of(whole, None, None)
    draw_tokens(whole, [token], bench.pictures / "timeline.svg")
    times = whole.overlap(token.began, token.ended)
    sentence = (
        f"In token {token.args['index']} ({times['window_s'] * 1e3:.0f} ms) experts were read for "
        f"{times['reading_s'] * 1e3:.1f} ms, {times['hidden_s'] * 1e3:.1f} ms of it behind other work, and waited for "
        f"during {times['waiting_s'] * 1e3:.1f} ms."
    )
    command = "foregate run reference --predictor stale-gate --prefetch 2 -p … --trace-events run.json; "
    return [Picture("timeline.svg", "Timeline", sentence, command + "foregate timeline run.json --out timeline.svg")]


def dashboard(bench: Bench) -> list[Picture]:
    """The live dashboard, as Chromium shows it."""
    from foregate.config import RunConfig, SamplingConfig
    from foregate.engine.engine import Engine
    from foregate.server.dashboard.serve import application, bind, server
    from foregate.server.dashboard.session import Session

    found = []
    with (
        Engine(RunConfig(predictor="stale-gate", prefetch="2")) as engine,
        bind("127.0.0.1", 0, allow_remote=False) as at,
    ):
        session = Session(engine)
        running = server(application(session))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [at]})
        thread.start()
        session.start(PROMPT, SamplingConfig(max_new_tokens=48))
        while session.running:
            time.sleep(0.1)
        hits = session.board.snapshot()["totals"]["expert_cache"]
        for theme in ("light", "dark"):
            live_screenshot(
                f"http://127.0.0.1:{at.getsockname()[1]}/", bench.pictures / f"dashboard_{theme}.png", theme
            )
            sentence = f"After 48 tokens {hits['hits']:,} of {hits['hits'] + hits['misses']:,} experts had been ready."
            command = "foregate dashboard reference --predictor stale-gate --prefetch 2"
            found.append(Picture(f"dashboard_{theme}.png", f"Dashboard, {theme}", sentence, command))
        running.should_exit = True
        thread.join()
        session.close()
    return found


STEPS: dict[str, Step] = {
    "routing": routing,
    "budget": budget,
    "report": report,
    "timeline": timeline,
    "dashboard": dashboard,
}
"""In the order of the page."""


def foregate(*arguments: str) -> None:
    """One command of this installation."""
    subprocess.run([sys.executable, "-m", "foregate", *arguments], check=True)


def screenshot(url: str, out: Path, *, width: int, height: int, dark: bool = False) -> None:
    """What headless Chromium shows of ``url``, as a PNG of few colours."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("error: no Chromium on this machine (Debian: apt-get install chromium)")
    with TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        flags += [f"--window-size={width},{height}", "--virtual-time-budget=5000", f"--screenshot={out}"]
        flags += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
        subprocess.run([browser, *flags, url], check=True, capture_output=True, timeout=120)
    few_colours(out)


def few_colours(png: Path) -> None:
    """Make the file small."""
    from PIL import Image

    with Image.open(png) as opened:
        small = opened.convert("RGB").quantize(128)
    small.save(png, optimize=True)


def live_screenshot(url: str, out: Path, theme: str) -> None:
    """Like ``screenshot``, of a page that never stops loading: its events keep coming."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1300,1180"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        features = [{"name": "prefers-color-scheme", "value": theme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(url)
        while not browser.find_elements("id", "tokens"):
            time.sleep(0.1)
        time.sleep(1)
        browser.save_screenshot(str(out))
    finally:
        browser.quit()
    few_colours(out)


def _charts(bench: Bench, study: Study, wanted: tuple[str, ...], prefix: str, command: str) -> list[Picture]:
    charts: dict[str, Chart] = {chart.name: chart for section in study.sections for chart in section.charts}
    told = captions(study)
    found = []
    for name in wanted:
        if name in charts:
            (file,) = draw(flat(charts[name]), bench.scratch, kinds=("svg",))
            shutil.copy(bench.scratch / file, bench.pictures / f"{prefix}{file}")
            found.append(Picture(f"{prefix}{file}", charts[name].title, told[name], command))
    return found


def remember(pictures: Path, step: str, found: list[Picture]) -> dict[str, list[Picture]]:
    """Write gallery.json with ``found`` in place of what ``step`` made before; returns the pictures of all steps."""
    file = pictures / "gallery.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for old in known.get(step, []):
        if old["file"] not in {picture.file for picture in found}:
            (pictures / old["file"]).unlink(missing_ok=True)
    known[step] = [asdict(picture) for picture in found]
    ordered = {name: known[name] for name in STEPS if name in known}
    file.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return {name: [Picture(**picture) for picture in kept] for name, kept in ordered.items()}


def page(known: dict[str, list[Picture]]) -> str:
    """docs/gallery.md."""
    parts = [HEAD]
    for step, pictures in known.items():
        what = (STEPS[step].__doc__ or "").splitlines()[0].replace("``", "`")
        parts.append(f"## {what.rstrip('.')}\n")
        for picture in pictures:
            parts.append(f"### {picture.title}\n\n{picture.sentence}\n")
            parts.append(f"![{picture.title}](gallery/{picture.file})\n\n`{picture.command}`\n")
    return "\n".join(parts)


def main(steps: list[str]) -> None:
    """Make ``steps``, or all."""
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        raise SystemExit(f"error: no step {', '.join(unknown)}; there are {', '.join(STEPS)}")
    pictures = DOCS / "gallery"
    pictures.mkdir(exist_ok=True)
    for step in steps or STEPS:
        with TemporaryDirectory() as scratch:
            found = STEPS[step](Bench(pictures, Path(scratch)))
        large = [picture.file for picture in found if (pictures / picture.file).stat().st_size > LARGEST]
        if large:
            raise SystemExit(f"error: {', '.join(large)} above {LARGEST:,} bytes")
        known = remember(pictures, step, found)
        (DOCS / "gallery.md").write_text(page(known), encoding="utf-8")
        print(f"{step}: {len(found)} pictures")


if __name__ == "__main__":
    main(sys.argv[1:])
