"""``foregate trace``, as a user meets it: from a data set to a trace that can be resumed, checked, merged and split."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foregate.checkpoint.pack import pack
from foregate.cli.trace import app
from foregate.errors import ConfigError, ForegateError, TraceError
from foregate.trace.format import TIMINGS
from foregate.trace.reader import TraceReader

Tiny = Callable[[str], Path]
Capture = pytest.CaptureFixture[str]


def cli(*args: object) -> int:
    """Run ``foregate trace ARGS``; our errors are raised, as they are for main()."""
    return int(app([str(arg) for arg in args], standalone_mode=False) or 0)


def printed(capsys: Capture, *args: object) -> Any:
    """The JSON that ``foregate trace ARGS`` prints."""
    capsys.readouterr()
    code = cli(*args, "--json")
    return json.loads(capsys.readouterr().out) | {"exit code": code}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"What is {n} times {n}?", "answer": f" It is {n * n}.", "domain": "sums"} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def experts(path: Path) -> dict[str, Any]:
    return {part.prompt: part.grid(part.experts) for part in TraceReader(path)}


def same_experts(one: Path, other: Path) -> bool:
    a, b = experts(one), experts(other)
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


def test_from_a_file_to_a_split(tiny: Tiny, tmp_path: Path, questions: Path, capsys: Capture) -> None:
    model, out = tiny("qwen3_moe"), tmp_path / "out"
    options = [
        "--dataset",
        questions,
        "--max-new-tokens",
        5,
        "--scores",
        "--timings",
        "--features",
        "residual, router_input",
    ]
    done = printed(capsys, model, *options, "--out", out, "--limit", 4, "--memory-budget", "50%")
    assert (done["done"], done["total"], done["skipped"], done["stopped"]) == (4, 4, 0, False)
    found = printed(capsys, "info", out)
    assert found["exit code"] == 0
    assert found["problems"] == []
    assert found["complete"] is True
    assert (found["layers"], found["top_k"], found["prompts"]) == (3, [4, 4, 4], 4)
    assert found["tokens"] == done["tokens"]
    assert found["rows"] == 3 * found["tokens"]
    assert found["decode_tokens"] == 4 * 4, "the last of five generated tokens is never routed"
    assert found["domains"]["sums"]["prompts"] == 4
    assert found["timings"] == list(TIMINGS)
    assert set(found["features"]) == {"residual", "router_input"}
    (run,) = found["runs"]
    assert run["source"] == "engine"
    assert run["settings"]["memory_budget"] == "50%"
    assert run["software"]["transformers"]
    assert found["bytes"] == sum(
        file.stat().st_size for file in out.rglob("*") if file.parent != out and file.is_file()
    )

    again = printed(capsys, model, *options, "--out", out, "--memory-budget", "50%", "--resume")
    assert (again["before"], again["done"]) == (4, 6)
    first = tmp_path / "first"
    assert cli(model, *options, "--out", first, "--limit", 2, "--memory-budget", "50%") == 0
    with pytest.raises(TraceError, match=r"'questions/00000' is in .*out as well"):  # with other timings
        cli("merge", out, first, "--out", tmp_path / "merged")
    counts = printed(capsys, "split", out, "--out", tmp_path / "split", "--fractions", "0.5,0.5,0", "--seed", 3)
    assert counts["train"] + counts["validation"] == 6
    assert cli("info", out) == 0
    text = capsys.readouterr().err
    assert "every file as it was written" in text


def test_what_is_routed_depends_neither_on_the_budget_nor_on_the_engine(
    tiny: Tiny, tmp_path: Path, questions: Path
) -> None:
    model = tiny("deepseek_v3")
    pack(model, tmp_path / "pack")
    options = ["--dataset", questions, "--max-new-tokens", 6, "--temperature", 0.7, "--seed", 5]
    cli(model, *options, "--out", tmp_path / "small", "--memory-budget", "25%")
    cli(model, *options, "--out", tmp_path / "large", "--memory-budget", "100%")
    cli(tmp_path / "pack", *options, "--out", tmp_path / "packed")
    assert same_experts(tmp_path / "small", tmp_path / "large")
    assert same_experts(tmp_path / "small", tmp_path / "packed")
    cli("merge", tmp_path / "small", tmp_path / "large", "--out", tmp_path / "merged")
    assert same_experts(tmp_path / "merged", tmp_path / "small")
    cli(model, *options, "--out", tmp_path / "resident", "--resident")
    assert TraceReader(tmp_path / "resident").header.runs[0].source == "resident"
    prompt = experts(tmp_path / "resident")["questions/00000"]
    assert np.array_equal(prompt, experts(tmp_path / "small")["questions/00000"])
    with pytest.raises(ConfigError, match=r"pack, which transformers cannot load"):
        cli(tmp_path / "pack", *options, "--out", tmp_path / "no", "--resident")


@pytest.mark.parametrize("how", [[], ["--resident"]])
def test_teacher_forced_routes_the_given_answer_in_one_pass(
    how: list[str], tiny: Tiny, tmp_path: Path, questions: Path
) -> None:
    out = tmp_path / "out"
    cli(tiny("olmoe"), "--dataset", questions, "--out", out, "--teacher-forced", "--max-new-tokens", 7, *how)
    part = next(iter(TraceReader(out)))
    decode = part.grid(part.decode)[:, 0]
    assert decode.sum() == 7
    assert (part.pass_index == 0).all()
    from foregate.engine.model import load_tokenizer

    tokenizer = load_tokenizer(tiny("olmoe"))
    assert " It is 0.".startswith(tokenizer.decode(part.grid(part.token_id)[decode, 0]))
    with pytest.raises(ConfigError, match=r"'synthetic' gives no answers"):
        cli(tiny("olmoe"), "--dataset", "synthetic", "--out", tmp_path / "no", "--teacher-forced")


def test_a_prompt_that_does_not_fit_is_skipped_and_noted(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt": "short"}\n' + json.dumps({"prompt": "long " * 300}) + '\n{"prompt": " "}\n')
    options = [tiny("olmoe"), "--dataset", path, "--max-new-tokens", 2]
    done = printed(capsys, *options, "--out", tmp_path / "out")
    assert (done["done"], done["skipped"]) == (3, 2)
    reader = TraceReader(tmp_path / "out")
    assert [line.prompt for line in reader.skipped] == ["long/00001", "long/00002"]
    assert "context" in reader.skipped[0].skipped
    assert printed(capsys, *options, "--out", tmp_path / "out", "--resume")["before"] == 3
    path.write_text('{"prompt": " "}\n')
    with pytest.raises(TraceError, match=r"none of the 1 prompts could be traced: the prompt is empty"):
        cli(*options, "--out", tmp_path / "none")


def test_nothing_is_overwritten_or_mixed(tiny: Tiny, tmp_path: Path, questions: Path) -> None:
    out = tmp_path / "out"
    options = ["--dataset", questions, "--max-new-tokens", 2, "--limit", 1]
    cli(tiny("olmoe"), *options, "--out", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for error, args in (
        (r"not empty.*--resume", [tiny("olmoe"), *options]),
        (r"max_new_tokens 2, not 3", [tiny("olmoe"), *options, "--resume", "--max-new-tokens", 3]),
        (r"is a trace of olmoe", [tiny("mixtral"), *options, "--resume"]),
        (r"source 'engine', not 'resident'", [tiny("olmoe"), *options, "--resume", "--resident"]),
        (r"other columns", [tiny("olmoe"), "--dataset", questions, "--max-new-tokens", 2, "--resume", "--scores"]),
    ):
        with pytest.raises(TraceError, match=error):
            cli(*args, "--out", out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--dataset", "nothing"], "no data set 'nothing'"),
        (["--dataset", "synthetic", "--features", "dreams"], "'dreams'"),
        (["--dataset", "synthetic", "--feature-dtype", "int8"], "'int8'"),
        (["--dataset", "synthetic", "--resident", "--memory-budget", "1GB"], "1GB"),
        (["--dataset", "synthetic", "--memory-budget", "lots"], "'lots'"),
        (["--dataset", "synthetic", "--temperature", "-1"], "-1"),
        (["--dataset", "held-out", "--split", "poetry"], "'poetry'.*prose"),
        (["--dataset", "held-out", "--domain", "x"], "--domain x"),
    ],
)
def test_bad_input_is_named_before_the_model_is_loaded(args: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ForegateError, match=words):
        cli("no-such-model", *args, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failures_leave_an_output_that_can_be_used_again(tiny: Tiny, tmp_path: Path, questions: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ForegateError, match="no-such-model"):
        cli("./no-such-model", "--dataset", questions, "--out", out)
    with pytest.raises(TraceError, match=r"no MoE layer of this model has a signal 'residual'"):
        cli(tiny("flex_olmo"), "--dataset", questions, "--out", out, "--features", "residual")
    assert cli(tiny("flex_olmo"), "--dataset", questions, "--out", out, "--limit", 1, "--max-new-tokens", 1) == 0


def test_merge_and_split_of_the_wrong_things(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one trace"):
        cli("merge", tmp_path, "--out", tmp_path / "out")
    with pytest.raises(ConfigError, match="'a,b'"):
        cli("split", tmp_path, "--out", tmp_path / "out", "--fractions", "a,b")
    with pytest.raises(TraceError, match=r"trace\.json: file is missing"):
        cli("info", tmp_path)


def test_info_of_a_damaged_trace_exits_with_1(tiny: Tiny, tmp_path: Path, questions: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    cli(tiny("olmoe"), "--dataset", questions, "--out", out, "--limit", 2, "--max-new-tokens", 1)
    victim = sorted((out / "parts").iterdir())[0]
    content = bytearray(victim.read_bytes())
    content[50] ^= 1
    victim.write_bytes(bytes(content))
    found = printed(capsys, "info", out)
    assert found["exit code"] == 1
    assert str(victim) in found["problems"][0]


def test_a_model_that_is_called_like_a_command(
    tiny: Tiny, tmp_path: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("info").symlink_to(tiny("olmoe"))
    options = ["--dataset", questions, "--limit", 1, "--max-new-tokens", 1]
    assert cli("./info", *options, "--out", "a") == 0
    assert cli("record", "info", *options, "--out", "b") == 0
    assert cli("--dataset", questions, "--limit", 1, "--max-new-tokens", 1, "--out", "c", "./info") == 0


def test_sigterm_ends_after_the_prompt_and_resume_goes_on(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    args = [str(tiny("qwen3_moe")), "--dataset", "synthetic", "--out", str(out), "--max-new-tokens", "3"]
    code = "import sys; from foregate.cli.trace import app; sys.exit(app(standalone_mode=False) or 0)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    manifest = out / "manifest.jsonl"
    while process.poll() is None and not (manifest.exists() and manifest.read_bytes().count(b"\n") >= 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    told, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    done = json.loads(told)
    assert done["stopped"] is True
    assert 2 <= done["done"] < done["total"] == 1000
    reader = TraceReader(out)
    assert (len(reader), reader.complete) == (done["done"], False)
    again = printed(capsys, *args, "--resume", "--limit", done["done"] + 1)
    assert (again["before"], again["done"], again["stopped"]) == (done["done"], done["done"] + 1, False)
    assert TraceReader(out).complete
