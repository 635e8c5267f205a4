"""Merging and splitting: nothing of another model, nothing twice, and no prompt on two sides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foregate.errors import TraceError
from foregate.trace.copying import SIDES, merge, side_of, split
from foregate.trace.header import FeatureInfo, Header
from foregate.trace.info import describe
from foregate.trace.reader import TraceReader
from test_trace_integrity import flip
from test_trace_records import RUN, make_header, make_record, write

HEADER = make_header(features={"residual": FeatureInfo("bfloat16", (3,), (0, 1, 2))})


def fill(path: Path, names: Iterable[str], header: Header = HEADER) -> Path:
    return write(path, header, [make_record(header, name) for name in names])


def contents(path: Path) -> dict[str, tuple[bytes, bytes]]:
    return {part.prompt: (part.experts.tobytes(), part.feature("residual").tobytes()) for part in TraceReader(path)}


def test_merge_keeps_every_prompt_and_every_run(tmp_path: Path) -> None:
    other = replace(
        HEADER, runs=(replace(RUN, seed=9),), model=replace(HEADER.model, name="the same under another name")
    )
    a = fill(tmp_path / "a", ["code/0", "code/1"])
    b = fill(tmp_path / "b", ["prose/0", "code/1"], other)
    assert merge([a, b], tmp_path / "c") == 3
    reader = TraceReader(tmp_path / "c")
    assert contents(tmp_path / "c") == contents(a) | contents(b)
    assert [run.seed for run in reader.header.runs] == [3, 9]
    assert {entry.prompt: reader.header.runs[entry.run].seed for entry in reader.entries} == {
        "code/0": 3,
        "code/1": 3,
        "prose/0": 9,
    }
    assert describe(tmp_path / "c")["problems"] == []


def test_merge_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    a = fill(tmp_path / "a", ["code/0"])
    model = fill(tmp_path / "model", ["code/1"], replace(HEADER, model=replace(HEADER.model, fingerprint="b" * 32)))
    plain = fill(tmp_path / "plain", ["code/1"], make_header())
    again = write(tmp_path / "again", HEADER, [make_record(HEADER, "code/0", seed=1)])
    for other, words in ((model, "cannot be merged"), (plain, "other columns"), (again, "'code/0' is in")):
        with pytest.raises(TraceError, match=f"{other}.*{words}"):
            merge([a, other], tmp_path / "c")
        assert not (tmp_path / "c").exists()
    with pytest.raises(TraceError, match="not empty"):
        merge([a, a], a)
    broken = fill(tmp_path / "broken", ["code/2"])
    flip(next((broken / "parts").iterdir()), 100)
    with pytest.raises(TraceError, match=r"broken.*corrupted"):
        merge([a, broken], tmp_path / "c")


def test_split_is_by_prompt_seeded_and_complete(tmp_path: Path) -> None:
    names = [f"code/{number}" for number in range(30)]
    source = fill(tmp_path / "t", names)
    counts = split(source, tmp_path / "s", [0.6, 0.2, 0.2], seed=1)
    sides = {name: set(contents(tmp_path / "s" / name)) for name in SIDES}
    assert {name: len(side) for name, side in sides.items()} == counts
    assert set().union(*sides.values()) == set(names)
    assert sum(counts.values()) == len(names)
    assert 9 <= counts["train"] <= 27
    split(source, tmp_path / "again", [0.6, 0.2, 0.2], seed=1)
    assert {name: set(contents(tmp_path / "again" / name)) for name in SIDES} == sides
    split(source, tmp_path / "other", [0.6, 0.2, 0.2], seed=2)
    assert set(contents(tmp_path / "other" / "test")) != sides["test"]
    whole = contents(source)
    for name in SIDES:
        assert all(whole[prompt] == rows for prompt, rows in contents(tmp_path / "s" / name).items())
        assert describe(tmp_path / "s" / name)["problems"] == []


def test_the_same_text_is_on_the_same_side_whatever_it_is_called(tmp_path: Path) -> None:
    records = [make_record(HEADER, f"code/{number}") for number in range(30)]
    twins = [replace(record, prompt=f"again/{number}") for number, record in enumerate(records)]
    split(write(tmp_path / "t", HEADER, records + twins), tmp_path / "s", [0.5, 0.25, 0.25], seed=0)
    for name in SIDES:
        kinds = [prompt.split("/") for prompt in contents(tmp_path / "s" / name)]
        assert {n for kind, n in kinds if kind == "code"} == {n for kind, n in kinds if kind == "again"}


def test_split_refuses_empty_sides_and_wrong_fractions(tmp_path: Path) -> None:
    source = fill(tmp_path / "t", ["code/0"])
    with pytest.raises(TraceError, match="of 1 prompts none would be in"):
        split(source, tmp_path / "s", [0.8, 0.1, 0.1], seed=0)
    assert not (tmp_path / "s").exists()
    for fractions in ([0.5, 0.5], [0.8, 0.1, 0.2], [1.2, -0.1, -0.1], [float("nan")] * 3):
        with pytest.raises(TraceError, match="fractions"):
            split(source, tmp_path / "s", fractions, seed=0)
    assert split(source, tmp_path / "s", [1.0, 0.0, 0.0], seed=0) == {"train": 1, "validation": 0, "test": 0}
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["train"]


def test_sides_are_as_large_as_their_fractions() -> None:
    names = [side_of(f"{number:016x}", [0.8, 0.1, 0.1], seed=5) for number in range(20_000)]
    shares = np.array([names.count(name) for name in SIDES]) / len(names)
    assert np.allclose(shares, [0.8, 0.1, 0.1], atol=0.01)
