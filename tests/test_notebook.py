"""The notebook runs from top to bottom, on the shipped trace and on any other; what it says is made from numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from foregate.analysis.captions import captions
from foregate.analysis.interactive import PLOTLY, figure
from foregate.analysis.notebook import execute, main
from foregate.analysis.settings import Settings
from foregate.analysis.study import Study, analyse
from foregate.cli.main import app
from foregate.errors import ConfigError
from foregate.trace.sample import SAMPLE
from test_analysis_traces import Chain, Independent, write_trace

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "routing_predictability.ipynb"
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


@pytest.fixture(scope="module")
def fresh() -> Any:
    """The notebook, executed now on the shipped trace."""
    return execute(NOTEBOOK)


def outputs(book: Any) -> list[dict[str, Any]]:
    return [dict(found["data"]) for cell in book["cells"] for found in cell.get("outputs", []) if "data" in found]


def texts(book: Any) -> list[str]:
    found = [data["text/markdown"] for data in outputs(book) if "text/markdown" in data]
    return ["".join(text) if isinstance(text, list) else text for text in found]


def test_every_cell_runs_and_every_chart_is_interactive_with_a_picture_beside_it(fresh: Any) -> None:
    code = [cell for cell in fresh["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(found["output_type"] == "display_data" for cell in code for found in cell["outputs"])  # no stderr
    charts = [data for data in outputs(fresh) if PLOTLY in data]
    assert len(charts) >= 14
    assert all("image/png" in data and data[PLOTLY]["data"] for data in charts)
    assert not any("this trace gives no" in text for text in texts(fresh) if "Time of a layer" not in text)


def test_the_stored_notebook_is_that_of_the_shipped_trace_and_small(fresh: Any) -> None:
    """Recorded the trace anew, or changed a statistic? ``make notebook``."""
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert NOTEBOOK.stat().st_size < 500_000
    now, then = texts(fresh), texts(stored)
    assert [NUMBER.sub("#", text) for text in now] == [NUMBER.sub("#", text) for text in then]
    for mine, theirs in zip(now, then, strict=True):
        values = [[float(n.replace(",", "").rstrip(".")) for n in NUMBER.findall(text)] for text in (mine, theirs)]
        assert values[0] == pytest.approx(values[1], rel=0.05, abs=0.01), theirs


def test_no_result_is_typed_into_the_text_or_the_code() -> None:
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    written = " ".join("".join(cell["source"]) for cell in stored["cells"])
    published = ("47-59 %",)
    for known in published:
        written = written.replace(known, "")
    assert not re.findall(r"\d\.\d", written)  # no measured share or accuracy
    assert "**Seen:**" not in written


def test_another_trace_gives_another_text_and_its_timings(tiny: Any, tmp_path: Path) -> None:
    """A trace recorded here, with timings, of another model: nothing in the notebook belongs to the shipped one."""
    prompts = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{n} and {n}", "domain": ("a", "b")[n % 2]} for n in range(8)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--dataset", prompts, "--max-new-tokens", 6, "--timings", "--memory-budget", "50%", "--threads", 1]
    arguments = ["trace", tiny("qwen3_moe"), *options, "--out", tmp_path / "trace"]
    done = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    told = "\n".join(texts(execute(NOTEBOOK, [tmp_path / "trace"])))
    assert re.search(r"decode: attention [0-9.]+%, routing [0-9.]+%, dispatch [0-9.]+%, compute [0-9.]+%, wait ", told)
    assert "side the published 47-59 %" in told
    assert "| prompts | 8 |" in told
    section = next(one for one in analyse([tmp_path / "trace"]).sections if one.name == "timing")
    assert section.notes == []
    shares = [row for row in section.tables[0].whole().to_pylist() if row["phase"] == "decode"]
    assert sum(row["share"] for row in shares) == pytest.approx(3)  # each of three layers is divided completely
    assert {chart.name for chart in section.charts} == {"timing_prefill", "timing_decode"}


def test_a_notebook_without_a_place_for_traces_is_refused(tmp_path: Path) -> None:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    book["cells"] = [cell for cell in book["cells"] if not cell["metadata"].get("tags")]
    (tmp_path / "other.ipynb").write_text(json.dumps(book))
    with pytest.raises(ConfigError, match="has 0 cells tagged parameters"):
        execute(tmp_path / "other.ipynb", [SAMPLE])
    with pytest.raises(SystemExit):
        main([str(NOTEBOOK), str(SAMPLE)])  # would store another trace's results as the shipped one's


def study(path: Path, **options: Any) -> Study:
    return analyse([path], Settings(permutations=100, replay_events=500, **options))


def test_what_is_seen_follows_the_numbers(tmp_path: Path) -> None:
    chain = captions(study(write_trace(tmp_path / "c", Chain(layers=4, top_k=1), prompts=12, domains=("a", "b"))))
    assert "top1 is 1.000 from the whole prefix and 1.000 from one layer" in chain["top1_by_hop_decode"]
    assert "above both at every hop" in chain["top1_by_hop_decode"]
    assert "in 100% of the cases" in chain["conditional"]
    free = captions(study(write_trace(tmp_path / "i", Independent(), prompts=12, domains=("a", "b"))))
    assert "layers 3 apart 0.00" in free["affinity"]
    assert free["domain_matrix"].startswith("0 of 1 pairs of domains differ")


@pytest.mark.parametrize(
    "odd", [{"layers": 1}, {"experts": 1, "top_k": 1}, {"layers": 1, "experts": 1, "top_k": 1}, {}], ids=str
)
def test_a_trace_that_gives_little_has_captions_for_what_there_is(tmp_path: Path, odd: dict[str, int]) -> None:
    """One layer, one expert, one prompt of one token: no caption may fail on an empty chart."""
    one = study(write_trace(tmp_path / "t", Independent(**odd), prompts=1, tokens=1))
    told = captions(one)
    assert all(told.values())
    assert all(figure(chart)["data"] is not None for section in one.sections for chart in section.charts)
