"""What docs/trace-format.md shows is run as it stands: DuckDB, pandas, polars and our own reader."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foregate.trace.header import RunInfo
from foregate.trace.identity import software
from foregate.trace.reader import TraceReader
from foregate.trace.writer import TraceWriter
from test_trace_records import make_header, make_record, write

DOCS = Path(__file__).parent.parent / "docs" / "trace-format.md"


def snippet(first: str) -> str:
    """The code after the comment that begins with ``first``, up to the end of its block."""
    found = re.search(rf"^(?:#|--) {re.escape(first)}[^\n]*\n(.*?)^```", DOCS.read_text(), re.M | re.S)
    assert found, first
    return found.group(1).strip()


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TraceReader:
    header = make_header((8, 8, 8, 8), (2, 2, 2, 2))
    records = [make_record(header, f"{kind}/{number}", 9, 5) for kind in ("code", "prose") for number in range(3)]
    path = write(tmp_path / "trace", header, records)
    monkeypatch.chdir(path)
    return TraceReader(path)


def test_the_duckdb_line(trace: TraceReader) -> None:
    duckdb = pytest.importorskip("duckdb")
    rows = duckdb.sql(snippet("duckdb")).fetchall()
    chosen = np.concatenate([part.experts.reshape(-1) for part in trace.parts(layers=[3])])
    counts = np.bincount(chosen, minlength=8)
    assert rows == sorted(((e, int(counts[e])) for e in range(8) if counts[e]), key=lambda row: (-row[1], row[0]))


def test_the_pandas_line(trace: TraceReader) -> None:
    pandas = pytest.importorskip("pandas")
    sizes = eval(snippet("pandas"), {"pandas": pandas})
    assert sizes.to_dict() == {
        (domain, phase): 3 * 4 * tokens
        for domain in ("code", "prose")
        for phase, tokens in (("decode", 4), ("prefill", 5))
    }


def test_the_polars_line(trace: TraceReader) -> None:
    polars = pytest.importorskip("polars")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        table = eval(snippet("polars"), {"polars": polars})
    for layer in range(4):
        first = np.concatenate([part.weights[:, 0] for part in trace.parts(layers=[layer])])
        assert table["weights"][layer] == pytest.approx(first.mean(), rel=1e-5)


def test_the_lines_of_our_own(trace: TraceReader, capsys: pytest.CaptureFixture[str]) -> None:
    exec(snippet("Foregate"), {})
    assert capsys.readouterr().out.splitlines()[0] == "code/0 (4, 2, 2)"


def test_the_tracker_and_the_writer_lines(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    code = DOCS.read_text().rsplit("```python\n", 1)[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny("olmoe"))
    names = {"model": model, "ids": torch.tensor([[5, 6, 7]]), "RunInfo": RunInfo, "TraceWriter": TraceWriter}
    exec(code, names | {"software": software})
    (part,) = TraceReader(tmp_path / "out" / "mine")
    assert part.prompt == "my/prompt/1"
    assert part.grid(part.feature("router_input")).shape == (3, 4, 64)


def test_the_layout_of_the_docs_is_computed_as_they_say(trace: TraceReader) -> None:
    import xxhash

    raw = json.loads((trace.path / "trace.json").read_text())
    fields = [{**raw["model"], "name": ""}, raw["scores"], raw["timings"], raw["features"]]
    assert raw["layout"] == xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())[:16]
    entry = json.loads((trace.path / "manifest.jsonl").read_text().splitlines()[0])
    part = next(iter(trace))
    asked = part.grid(part.token_id)[~part.grid(part.decode)[:, 0], 0].astype("<i4")
    assert entry["content"] == xxhash.xxh3_64_hexdigest(asked.tobytes())
    assert entry["part"]["file"] == f"parts/code-0-{xxhash.xxh3_64_hexdigest(b'code/0')[:8]}.parquet"


def test_every_column_of_the_docs_exists(trace: TraceReader) -> None:
    from foregate.trace.format import TIMINGS, part_schema

    table = DOCS.read_text().split("| column |")[1].split("\n\n")[0]
    documented = re.findall(r"^\| `(\w+)`", table, re.M)
    names = part_schema("uint8", scores=True, timings=TIMINGS).names
    assert names[: len(documented)] == documented
    assert all(f"`{name}`" in DOCS.read_text() for name in names)
