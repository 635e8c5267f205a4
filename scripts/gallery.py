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


STEPS: dict[str, Step] = {"routing": routing, "budget": budget, "report": report}
"""In the order of the page."""


def foregate(*arguments: str) -> None:
    """One command of this installation."""
    subprocess.run([sys.executable, "-m", "foregate", *arguments], check=True)


def screenshot(url: str, out: Path, *, width: int, height: int, dark: bool = False) -> None:
    """What headless Chromium shows of ``url``, as a PNG of few colours."""
    from PIL import Image

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("error: no Chromium on this machine (Debian: apt-get install chromium)")
    with TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        flags += [f"--window-size={width},{height}", "--virtual-time-budget=5000", f"--screenshot={out}"]
        flags += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
        subprocess.run([browser, *flags, url], check=True, capture_output=True, timeout=120)
    with Image.open(out) as opened:
        small = opened.convert("RGB").quantize(128)
    small.save(out, optimize=True)


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
