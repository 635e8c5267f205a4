"""The leaderboard: its commands exist, its table comes from results alone, and strangers are in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from foregate.cli.main import app
from foregate.errors import TraceError
from foregate.evaluation import leaderboard
from foregate.evaluation.candidates import split_lookahead, trainable_free
from foregate.predictors import PREDICTORS

ROOT = Path(__file__).parent.parent


def entry(gain: float, source: str = "", domain: str = "code") -> dict[str, object]:
    rates = {"recall_at_k": 0.5, "exact_set": 0.25, "top1": 0.75, "at_least_half": 0.5, "jaccard": 0.4}
    values = {"recall_on_misses": {"25%": 0.5}, "oracle_gain": {"25%": gain}}
    cell = {"useful_bytes": 5, "late_bytes": 3, "wasted_bytes": 2, "oracle_gain": gain}
    values = {key: {budget: max(0.0, rate) for budget, rate in table.items()} for key, table in values.items()}
    return {
        **rates, **values, "us_per_token": 12.0, "parameters": 7, "recall_at": {"2": 0.5, "4": 0.9}, "source": source,
        "moment": "after-routing", "lookahead": 1, "cache": {"lfru": {"25%": cell}},
        "by_domain": {domain: {**rates, **values, "oracle_gain_signed": {"25%": gain}, "prompts": 1}},
    }  # fmt: skip


def write(path: Path) -> None:
    about = {
        "model_name": "m", "prompts": 1, "prompts_in_traces": 9, "tokens": {"code": 10}, "layers": 4, "top_k": 2,
        "experts": 8, "policy": "lfru", "reads_per_layer": 2, "controls": ["none: 0"], "left_out": {"x": "no feature"},
    }  # fmt: skip
    predictors = {
        "none": entry(0),
        "stale-gate": entry(0.6, "FATE"),
        "mine": entry(0.7, "ours"),
        "b+c": entry(0.65, "FATE"),
        "slower": entry(-0.12, "ours"),
    }
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps({"predictors": predictors, "trace": "abc", "model": "f" * 32, "commit": "123", "about": about})
    )


def test_a_table_that_says_what_no_result_says(tmp_path: Path) -> None:
    write(tmp_path / "results" / "m.json")
    leaderboard.write_table(tmp_path / "results", tmp_path / "LEADERBOARD.md")
    text = (tmp_path / "LEADERBOARD.md").read_text()
    assert "trace abc, commit 123" in text
    assert "best of ours and combinations: mine 70.0 %; best of published methods: stale-gate 60.0 %" in text
    assert text.index("| mine |") < text.index("| b+c |") < text.index("| stale-gate |")
    assert "30.0 | 20.0 | 12 | 7 |" in text
    assert "left out: x: no feature" in text
    assert text.count("| -12.0 |") == 2, "what is slower than the cache alone must not read 0"


def test_no_result_at_all(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no result"):
        leaderboard.write_table(tmp_path, tmp_path / "LEADERBOARD.md")


def test_the_kept_copy_is_the_result(tmp_path: Path) -> None:
    write(tmp_path / "a" / "result.json")
    leaderboard._keep(tmp_path / "a" / "result.json", tmp_path / "b" / "m.json")
    assert json.loads((tmp_path / "b" / "m.json").read_text()) == json.loads(
        (tmp_path / "a" / "result.json").read_text()
    )


def test_a_command_with_an_option_that_is_gone(tmp_path: Path) -> None:
    """Every command of ``make leaderboard`` parses; a renamed option would be noticed after an hour of training.

    A model in a directory is named where it is run: traces know its name alone.
    """
    model = str(tmp_path)
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    for name in ("pre-attention", "fusion", "sequence"):
        (zoo / f"{name}.safetensors").touch()
    group = typer.main.get_command(app)
    commands = leaderboard.trace_commands(model, tmp_path, tmp_path, 0.1)
    commands += leaderboard.train_commands(model, tmp_path, 2) if "train" in group.commands else []  # type: ignore[attr-defined]
    evaluation = leaderboard.evaluate_command(model, tmp_path, 2)
    assert any(text.count("+") == 1 and "fusion" in text for text in evaluation)
    for arguments in [evaluation, *(c for c in commands if "--all" in c)]:
        assert arguments[arguments.index("--model") + 1] == model
    for arguments in [*commands, evaluation]:
        command = group.commands[arguments[0]]  # type: ignore[attr-defined]
        command.make_context(arguments[0], list(arguments[1:]), resilient_parsing=False)


def test_a_stranger_that_is_not_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PREDICTORS.__dict__, "_installed", {"stranger": "foregate.predictors.random:RandomExperts"})
    assert "stranger" in trainable_free()
    assert "none" not in trainable_free()


def test_a_file_name_taken_for_a_lookahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_lookahead("next-gate@2") == ("next-gate", 2)
    assert split_lookahead("next-gate") == ("next-gate", None)
    monkeypatch.chdir(tmp_path)
    Path("mine@2").touch()
    assert split_lookahead("mine@2") == ("mine@2", None)
