"""Traces on which little can be computed: the report says so, or one line does; never a stack trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foregate.errors import TraceError
from foregate.trace.sample import SAMPLE, locate, spoken
from foregate.trace.writer import TraceWriter
from test_analysis_output import run
from test_analysis_traces import Chain, Independent, header, write_trace


def notes(path: Path, out: Path, *options: str) -> dict[str, list[str]]:
    found = json.loads(run(path, "--out", out, "--json", "--no-figures", "--permutations", "20", *options))
    return {name: section["notes"] for name, section in found["sections"].items()}


def test_one_prompt_says_what_cannot_be_computed(tmp_path: Path) -> None:
    found = notes(write_trace(tmp_path / "t", Chain(), prompts=1), tmp_path / "out")
    assert found["accuracy"] == [
        "One prompt cannot be split into train and test: accuracy would be that of what was counted. Trace more."
    ]
    assert "no comparison" in found["domains"][-1]
    assert "no timings" in found["timing"][0]


def test_one_layer_says_what_cannot_be_computed(tmp_path: Path) -> None:
    found = notes(write_trace(tmp_path / "t", Independent(layers=1)), tmp_path / "out")
    assert found["cross_layer"] == ["The model has one MoE layer: nothing about pairs of layers can be computed."]


def test_one_domain_says_what_cannot_be_computed(tmp_path: Path) -> None:
    found = notes(write_trace(tmp_path / "t", Independent()), tmp_path / "out")
    assert found["domains"] == ["Fewer than two domains have two or more prompts: no comparison."]


def test_no_decode_tokens_says_what_cannot_be_computed(tmp_path: Path) -> None:
    found = notes(write_trace(tmp_path / "t", Independent(), decode_share=0), tmp_path / "out")
    assert "No decode tokens in the test prompts: no recall on misses." in found["accuracy"]
    assert "No decode tokens in the replayed prompts: no decode hit curve." in found["cache"]
    with pytest.raises(TraceError, match="no decode tokens, nothing to analyse"):
        notes(tmp_path / "t", tmp_path / "other", "--phase", "decode")


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_one_phase_is_the_arm_of_every_section(tmp_path: Path, phase: str) -> None:
    path = write_trace(tmp_path / "t", Chain(), prompts=6, tokens=20)
    printed = run(path, "--out", tmp_path / "out", "--json", "--no-figures", "--phase", phase)
    found = json.loads(printed)
    assert found["facts"]["tokens_by_phase"] == {"prefill": 0, "decode": 0} | {phase: 60}
    assert list(found["sections"]["accuracy"]["numbers"]) == [phase]
    assert {row["arm"] for row in found["sections"]["cache"]["numbers"]["hit_rate"]} == {phase}


def test_one_expert_a_layer_leaves_no_choice_and_no_traceback(tmp_path: Path) -> None:
    found = notes(write_trace(tmp_path / "t", Independent(experts=1, top_k=1)), tmp_path / "out")
    assert "one expert leave no choice" in found["usage"][0]


def test_one_token_a_prompt_leaves_no_traceback(tmp_path: Path) -> None:
    assert "two tokens" in notes(write_trace(tmp_path / "t", Chain(), tokens=1), tmp_path / "out")["locality"][0]


def test_the_smallest_trace_can_be_drawn(tmp_path: Path) -> None:
    """One layer of one expert, two prompts of one token: axes without a range, matrices without a difference."""
    path = write_trace(tmp_path / "t", Independent(layers=1, experts=1, top_k=1), prompts=2, tokens=1, timings={})
    run(path, "--out", tmp_path / "out", "--permutations", "5")
    assert (tmp_path / "out" / "figures" / "usage.svg").is_file()


def test_an_empty_trace_is_one_line(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t") as writer:
        writer.begin(header(Chain()))
        writer.finish()
    with pytest.raises(TraceError, match=r"^\S+: no prompts, nothing to analyse$"):
        run(tmp_path / "t", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(TraceError, match="is not a trace"):
        run(tmp_path / "missing", "--out", tmp_path / "out")


def test_the_shipped_trace_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(Path("sample")) == SAMPLE
    (tmp_path / "sample").mkdir()
    assert locate(Path("sample")) == Path("sample")  # a trace of one's own comes first
    assert locate(Path("other")) == Path("other")
    assert spoken(SAMPLE) == "sample"  # no path of this machine in a report that is handed on
