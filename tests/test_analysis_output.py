"""What ``foregate analyze`` writes, says and refuses; traces on which little can be computed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import typer
from matplotlib.image import imread
from typer.testing import CliRunner

from foregate.analysis import figures
from foregate.analysis.chart import Lines, Series
from foregate.analysis.output import FORMAT
from foregate.analysis.table import Table, table
from foregate.cli.analyze import analyze
from foregate.errors import ConfigError
from test_analysis_traces import Chain, Planted, write_trace

ALL_TIMES = {"attention_ns": 5, "routing_ns": 3, "dispatch_ns": 2, "experts_ns": 5, "expert_wait_ns": 1}
app = typer.Typer()
app.command()(analyze)


def run(*arguments: Any) -> str:
    """Standard output of the command; raises what it raises."""
    done = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A full analysis, with figures: its directory, and the summary that it printed."""
    root = tmp_path_factory.mktemp("full")
    router = Planted(layers=3, experts=8)
    path = write_trace(root / "t", router, prompts=12, tokens=20, domains=("a", "b"), timings=ALL_TIMES)
    printed = run(path, "--out", root / "out", "--json", "--permutations", "50")
    return root / "out", json.loads(printed)


def test_the_summary_is_printed_and_written_and_names_every_arm(full: tuple[Path, dict[str, Any]]) -> None:
    out, summary = full
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["format"] == FORMAT
    assert set(summary["sections"]) == {
        "accuracy", "cross_layer", "usage", "paths", "locality", "cache", "domains", "timing",
    }  # fmt: skip
    for section in summary["sections"].values():
        assert section["arm"]
        assert section["method"]
        assert section["findings"]
    assert summary["facts"]["decisions"] == 12 * 20 * 3


def test_every_table_is_there_as_parquet_and_csv_with_the_same_rows(full: tuple[Path, dict[str, Any]]) -> None:
    out, summary = full
    names = {found["name"] for found in summary["tables"]}
    assert {path.stem for path in (out / "tables").iterdir()} == names
    for found in summary["tables"]:
        columns = pq.read_table(out / "tables" / f"{found['name']}.parquet")
        assert columns.num_rows == found["rows"] > 0
        assert found["csv"]
        comma = pa_csv.read_csv(out / "tables" / f"{found['name']}.csv")
        assert (comma.num_rows, comma.column_names) == (found["rows"], columns.column_names)


def test_every_figure_is_there_as_svg_and_png(full: tuple[Path, dict[str, Any]]) -> None:
    out, summary = full
    assert {path.name for path in (out / "figures").iterdir()} == set(summary["figures"])
    assert all((out / "figures" / name).stat().st_size > 1000 for name in summary["figures"])
    assert {"affinity.svg", "recall_k_by_hop_decode.png", "hit_curve_decode.svg", "timing_decode.svg"} <= set(
        summary["figures"]
    )


def test_the_same_numbers_give_the_same_figure(tmp_path: Path) -> None:
    curve = Series("a", [1.0, 2.0], [0.5, None], [0.4, None], [0.6, None])
    chart = Lines("one", "title", "x", "y", [curve, Series("b", [1.0, 2.0], [0.1, 0.2], dashed=True)], log=True)
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        found.append([(tmp_path / name / file).read_bytes() for file in figures.draw(chart, tmp_path / name)])
    assert found[0] == found[1]


class Links(HTMLParser):
    """Everything that a page would load, and the tags left open."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "link", "br", "path", "i"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


def test_the_report_loads_nothing_from_anywhere(full: tuple[Path, dict[str, Any]]) -> None:
    text = (full[0] / "report.html").read_text()
    links = Links()
    links.feed(text)
    assert links.open == []
    assert all(link.startswith("#") or link == "data:," for link in links.loaded)
    outside = set(re.findall(r"https?://[^\s\"'`<)]+", text))
    assert outside == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert len(text) < 400_000


def test_the_report_shows_every_chart_with_its_numbers(full: tuple[Path, dict[str, Any]]) -> None:
    text = (full[0] / "report.html").read_text()
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])
    assert set(re.findall(r'data-chart="([^"]+)"', text)) == set(data["charts"])
    assert {chart["kind"] for chart in data["charts"].values()} == {"lines", "heat", "matrices"}


KEYS = """<script>
const press = (node, key) => node.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const said = (node) => [...node.closest("figure").querySelectorAll(".readout")].pop().textContent;
const svg = document.querySelector("figure > svg"), canvas = document.querySelector("canvas");
for (const key of ["ArrowRight", "ArrowRight", "ArrowDown"]) press(svg, key);
for (const key of ["ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight"]) press(canvas, key);
const before = document.documentElement.dataset.theme;
document.getElementById("theme").click();
document.querySelector("figure .legend button").click();
for (const numbers of document.querySelectorAll("figure details")) numbers.open = true;
setTimeout(() => {
  const rows = document.querySelectorAll("figure details table").length;
  const after = document.documentElement.dataset.theme;
  const hidden = document.querySelectorAll('[aria-pressed="false"]').length;
  document.body.append(`[[${[said(svg), said(canvas), before + ">" + after, rows > 0, hidden > 0].join("|")}]]`);
}, 500);
</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_draws_the_report_and_obeys_the_keyboard(full: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    page = tmp_path / "pressed.html"
    page.write_text((full[0] / "report.html").read_text().replace("</body>", KEYS))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--enable-logging=stderr"]
    command = ["chromium", *flags, "--virtual-time-budget=4000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert 'data-ready="yes"' in done.stdout
    assert "CONSOLE" not in done.stderr
    charts = len(re.findall("<figure", done.stdout))
    assert len(re.findall("<figcaption", done.stdout)) == charts > 10
    curve, cell, theme, tables, hidden = re.findall(r"\[\[([^\]]*(?:\][^\]]+)*)\]\]", done.stdout)[-1].split("|")
    assert curve.startswith("prefix: hop 2, top1 ")
    assert re.fullmatch(r"from layer 1, predicted layer 2: recall_k [0-9.]+", cell)
    assert theme in ("light&gt;dark", "dark&gt;light")
    assert (tables, hidden) == ("true", "true")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("dark", [False, True])
def test_the_report_follows_the_reader_s_choice_of_light_or_dark(
    full: tuple[Path, dict[str, Any]], tmp_path: Path, dark: bool
) -> None:
    """Leaves a picture of it in $OUT/screenshots."""
    kept = Path(os.environ.get("OUT", "out")) / "screenshots"
    kept.mkdir(parents=True, exist_ok=True)
    picture = kept.absolute() / f"report_{'dark' if dark else 'light'}.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--window-size=1180,1600"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={picture}"]
    page = (full[0] / "report.html").as_uri()
    subprocess.run(["chromium", *flags, page], capture_output=True, timeout=120, check=True)
    pixels = imread(picture)[:, :, :3]
    shades = {"page": pixels[5, 5].mean(), "middle": float(np.median(pixels))}
    assert all(value < 0.2 if dark else value > 0.9 for value in shades.values()), shades
    assert pixels.std() > 0.05  # something is drawn on it


def test_a_name_in_the_trace_cannot_break_out_of_the_report(tmp_path: Path) -> None:
    name = "</script><b>x"
    path = write_trace(tmp_path / "t", Chain(), prompts=4, domains=(name, "y"), name=name)
    run(path, "--out", tmp_path / "out", "--no-figures", "--permutations", "5")
    text = (tmp_path / "out" / "report.html").read_text()
    assert name not in text
    assert "&lt;/script&gt;&lt;b&gt;x" in text


def test_output_that_would_mix_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty; give another directory"):
        run(tmp_path / "t", "--out", tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        run(tmp_path / "t", "--out", tmp_path / "notes.txt")


def test_without_matplotlib_the_user_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'foregate\[analysis\]', or give --no-figures"):
        run(tmp_path / "t", "--out", tmp_path / "out")


def test_analysis_needs_no_torch() -> None:
    check = "import sys, foregate.analysis.output, foregate.cli.analyze; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_long_tables_come_as_parquet_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foregate.analysis.table.CSV_ROWS", 5)
    short = table("short", "", n=[1, 2, 3])
    long = Table("long", "", lambda: [short.whole()] * 3)
    assert [one.write(tmp_path)["csv"] for one in (short, long)] == [True, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.parquet", "short.csv", "short.parquet"]
