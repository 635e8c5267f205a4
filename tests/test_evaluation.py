"""Evaluation: hand-counted metrics, controls that stop the command when they are off, and the form of the result."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from foregate.analysis.prompt import Shape
from foregate.cli.main import app
from foregate.errors import ConfigError, ControlError, TraceError
from foregate.evaluation.accuracy import count, metric_names
from foregate.evaluation.bootstrap import Bootstrap
from foregate.evaluation.candidates import Candidate, candidates
from foregate.evaluation.controls import check_controls
from foregate.evaluation.held_out import HeldOut
from foregate.evaluation.judge import Bench, Judged
from foregate.evaluation.misses import covered, residents
from foregate.evaluation.result import _ratio, result
from foregate.evaluation.run import judge_all
from foregate.evaluation.settings import Settings, parse_budgets
from foregate.evaluation.table import rows, terminal
from foregate.trace.sample import SAMPLE
from foregate.training.dataset import TEST, side

BUDGETS = (0.10, 0.25)
SHAPE = Shape((6, 6), (2, 2))


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Settings((SAMPLE,), residencies=BUDGETS, tokens=300, sim_tokens=60, bootstrap=200))


@pytest.fixture(scope="module")
def judged(bench: Bench) -> dict[str, Judged]:
    found, left_out = judge_all(bench, candidates(["random"], None), jobs=1)
    assert set(left_out) == {"fresh-gate"}, "the sample trace has no features"
    return found


def test_metrics_that_mean_something_else() -> None:
    chosen = np.array([[[0, 1], [2, 3]]], np.int32)
    ranks = np.array([[[0, 2, 1, 3, 4, 5], [3, 2, -1, -1, -1, -1]]], np.int16)
    sums, made = count(ranks, chosen, SHAPE)
    found = dict(zip(metric_names(SHAPE), sums.T.tolist()[0], strict=True))
    assert found == {
        "recall_at_k": 0.5, "recall_at_k+1": 1.0, "recall_at_k+2": 1.0, "exact_set": 0.0, "top1": 1.0,
        "at_least_half": 1.0, "jaccard": pytest.approx(1 / 3), "rank_alignment": 0.5,
    }  # fmt: skip
    second = dict(zip(metric_names(SHAPE), sums.T.tolist()[1], strict=True))
    assert (second["exact_set"], second["jaccard"], second["rank_alignment"]) == (1.0, 1.0, 0.0)
    assert made.tolist() == [1, 1]


def test_layers_without_a_prediction_count_as_wrong_in_recall_and_as_covered_in_misses() -> None:
    chosen = np.array([[[0, 1], [2, 3]]], np.int32)
    nothing = np.full((1, 2, 6), -1, np.int16)
    assert count(nothing, chosen, SHAPE)[1].tolist() == [0, 0]
    hit, missing, read = covered(nothing, chosen, np.zeros((1, 2, 6), bool), 2)
    assert (hit.tolist(), missing.tolist(), read.tolist()) == ([0, 0], [2, 2], [0, 0])


def test_equal_bytes_that_count_residents_as_reads() -> None:
    chosen = np.array([[[4, 5]]], np.int32)
    ranks = np.array([[[0, 4, 1, 5, 2, 3]]], np.int16)
    resident = np.zeros((1, 1, 6), bool)
    resident[0, 0, [0, 1]] = True
    hit, missing, read = covered(ranks, chosen, resident, 1)
    assert (hit[0], missing[0], read[0]) == (1, 2, 1)
    hit, missing, read = covered(ranks, chosen, resident, 3)
    assert (hit[0], missing[0], read[0]) == (2, 2, 3)
    resident[0, 0, 4] = True
    hit, missing, _ = covered(ranks, chosen, resident, 1)
    assert (hit[0], missing[0]) == (1, 1)


@pytest.mark.parametrize("policy", ["lru", "lfru", "echo", "belady"])
def test_residents_that_are_not_those_of_the_replay(bench: Bench, policy: str) -> None:
    found = residents(bench.prompts, bench.shape, policy, 64, bench.worths)
    assert not found[0][0, 0].any(), "cold at first"
    held = np.concatenate(found)[:, :, :].reshape(-1, bench.shape.layers, bench.shape.experts)
    chosen = np.concatenate([p.experts for p in bench.prompts])
    before = held[1:, 0]  # every token's first layer: what was held there is at most the pool
    assert before.sum(axis=1).max() <= 64
    if policy == "lru":
        last = chosen[:-1, -1]  # the last event of a token is the newest: it is held when the next token begins
        assert np.take_along_axis(held[1:, -1], last.astype(int), axis=1).all()


def test_controls_read_what_they_must(bench: Bench, judged: dict[str, Judged]) -> None:
    lines = check_controls(judged, bench.shape, bench.reads, Bootstrap(len(bench.prompts), 200, 0))
    assert len(lines) == 3
    assert "covers every miss" in lines[1]


@pytest.mark.parametrize("broken", ["none", "oracle", "shuffled"])
def test_a_broken_control_that_goes_unnoticed(bench: Bench, judged: dict[str, Judged], broken: str) -> None:
    other = {"none": "random", "oracle": "shuffled", "shuffled": "oracle"}[broken]
    with pytest.raises(ControlError, match=f"control {broken}"):
        check_controls(
            judged | {broken: judged[other]}, bench.shape, bench.reads, Bootstrap(len(bench.prompts), 200, 0)
        )


def test_the_form_of_the_result(bench: Bench, judged: dict[str, Judged]) -> None:
    found = json.loads(json.dumps(result(bench, judged, {"fresh-gate": "why"}), allow_nan=False))
    assert {"predictors", "trace", "model", "commit"} <= set(found)
    required = {"recall_at_k", "exact_set", "top1", "at_least_half", "jaccard", "recall_on_misses", "oracle_gain",
                "us_per_token", "parameters"}  # fmt: skip
    for name, one in found["predictors"].items():
        assert required <= set(one), name
        rates = [one[key] for key in required if key not in ("us_per_token", "parameters")]
        flat = [v for rate in rates for v in (rate.values() if isinstance(rate, dict) else [rate])]
        assert all(0 <= value <= 1 for value in flat), (name, flat)
        assert list(one["recall_on_misses"]) == ["10%", "25%"]
        assert len(one["by_layer"]["recall_at_k"]) == bench.shape.layers
        assert sum(entry["prompts"] for entry in one["by_domain"].values()) == len(bench.prompts)
    oracle, none = found["predictors"]["oracle"], found["predictors"]["none"]
    assert oracle["oracle_gain"] == {"10%": 1.0, "25%": 1.0}
    assert none["recall_on_misses"] == none["oracle_gain"] == {"10%": 0.0, "25%": 0.0}
    assert found["about"]["left_out"] == {"fresh-gate": "why"}
    assert list(oracle["cache"]) == ["lru", "lfru", "echo", "belady"]
    assert "choices alone" in found["about"]["echo_sees"], "the sample trace has no router scores"


@pytest.mark.parametrize("width", [80, 200])
def test_a_table_whose_numbers_are_cut(width: int, bench: Bench, judged: dict[str, Judged]) -> None:
    found = result(bench, judged, {})
    output = StringIO()
    for table in terminal(found, width):
        Console(file=output, width=width).print(table)
    shown = output.getvalue()
    assert "…" not in shown
    for row in rows(found):
        assert all(cell in shown for cell in row[2:]), row
    assert max(map(len, shown.splitlines())) <= width


def test_the_same_seed_another_result(bench: Bench) -> None:
    first, second = (bench.judge(Candidate("random", ("random",))) for _ in range(2))
    assert np.array_equal(first.sums, second.sums)
    assert all(np.array_equal(first.stalls[cell], second.stalls[cell]) for cell in bench.cells)


def test_a_combination_reads_more_than_its_members(bench: Bench, judged: dict[str, Judged]) -> None:
    both = bench.judge(Candidate("random+oracle", ("random", "oracle")))
    for cell in bench.cells:
        assert both.sims[cell].issued <= bench.reads * both.sims[cell].events
        assert np.array_equal(both.covered[cell][:, 1], judged["oracle"].covered[cell][:, 1])


def test_prompts_that_a_predictor_was_trained_on() -> None:
    held = HeldOut([SAMPLE])
    assert held.items
    assert all(side(entry) == TEST for _, entry in held.items)
    assert len(held.items) < held.prompts_in_all


def test_a_trace_without_held_out_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foregate.evaluation.held_out.side", lambda entry: "train")
    with pytest.raises(TraceError, match="none with decode tokens is held out"):
        HeldOut([SAMPLE])


@pytest.mark.parametrize("text", ["25", "0%", "100%", "x%", "-5%"])
def test_a_budget_that_is_accepted_and_ignored(text: str) -> None:
    with pytest.raises(ConfigError, match="budget"):
        Settings((SAMPLE,), residencies=parse_budgets(text))


def test_two_predictors_under_one_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two predictors are called"):
        candidates(["random", "random"], None)
    with pytest.raises(ConfigError, match="no predictor files"):
        candidates([], tmp_path)


def test_a_share_of_a_gain_that_is_a_loss() -> None:
    draws = Bootstrap(2, 100, 0)
    assert np.isnan(draws.ratio(np.array([1.0, 1.0]), np.array([-2.0, -1.0]))).all()
    assert np.isnan(draws.ratio(np.array([1.0, 1.0]), np.array([-2.0, 1.0]))).all()
    assert draws.ratio(np.array([1.0, 1.0]), np.array([3.0, 1.0]))[0] == 0.5
    assert np.isnan(_ratio(np.array([1.0]), np.array([-2.0])))


def test_an_interval_that_treats_tokens_as_independent() -> None:
    draws = Bootstrap(2, 500, 0)
    value, low, high = draws.ratio(np.array([0.0, 100.0]), np.array([100.0, 100.0]))
    assert (value, low, high) == (0.5, 0.0, 1.0)


def test_the_command(tmp_path: Path) -> None:
    arguments = ["evaluate", "--trace", str(SAMPLE), "--predictor", "random", "--budget", "25%", "--policies", "lru",
                 "--tokens", "100", "--sim-tokens", "30", "--out", str(tmp_path / "out"), "--json"]  # fmt: skip
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert set(found["predictors"]) == {"none", "oracle", "shuffled", "random"}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"result.json", "table.md", "oracle_gain.svg", "recall_by_layer.svg"} <= files
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == found
