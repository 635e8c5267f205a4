"""``foregate train``: the same bytes from the same seed, also after a kill; what it refuses; many methods at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foregate.cli.train import _told
from foregate.errors import ConfigError
from foregate.testing.routing import made_trace
from foregate.training import fleet, loop, run
from foregate.training.fleet import Job, Outcome, jobs, train_all
from foregate.training.run import Request, merge_options, train
from foregate.training.standing import Standing

QUICK = ("hidden=24", "epochs=3", "block=64", "batch=32")


class Bar:
    def __init__(self) -> None:
        self.told: list[str] = []

    def begin(self, stage: str, total: int | None) -> None: ...

    def advance(self, units: int = 1) -> None: ...

    def tell(self, line: str) -> None:
        self.told.append(line)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_trace(tmp_path_factory.mktemp("made") / "trace", prompts=60, seed=3)


def request(trace: Path, out: Path, *given: str, name: str = "history-mlp") -> Request:
    return Request(name, (trace,), out, given or QUICK, threads=1)


def test_same_seed_same_bytes_and_another_seed_others(trace: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(request(trace, tmp_path / f"{name}.safetensors", *QUICK, f"seed={seed}"), Bar())
    contents = [(tmp_path / f"{name}.safetensors").read_bytes() for name in "abc"]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize("steps", [3, 11, 25])
def test_killed_and_continued_is_the_same_as_never_killed(
    steps: int, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    train(request(trace, tmp_path / "whole.safetensors"), Bar())
    taken, step = [0], loop.Training._step

    def dying(self: Any, *arguments: Any) -> float:
        taken[0] += 1
        if taken[0] > steps:
            raise KeyboardInterrupt
        return step(self, *arguments)

    out = tmp_path / "killed.safetensors"
    monkeypatch.setattr(loop.Training, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train(request(trace, out), Bar())
    assert not out.exists()
    monkeypatch.setattr(loop.Training, "_step", step)
    bar = Bar()
    train(request(trace, out), bar)
    assert "continuing" in bar.told[0]
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    curves = [(tmp_path / f"{name}.curve.jsonl").read_text() for name in ("killed", "whole")]
    assert curves[0] == curves[1]
    assert sorted(path.name for path in tmp_path.iterdir() if "killed" in path.name) == [
        "killed.curve.jsonl",
        "killed.safetensors",
    ]


def test_a_finished_file_is_kept_and_another_is_not_overwritten(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    train(request(trace, out), Bar())
    before = out.read_bytes()
    bar = Bar()
    train(request(trace, out), bar)
    assert "trained already" in bar.told[0]
    with pytest.raises(ConfigError, match="holds another training"):
        train(request(trace, out, *QUICK, "seed=9"), Bar())
    assert out.read_bytes() == before


def test_a_checkpoint_of_other_options_is_not_continued(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "p.safetensors"
    checkpoints: list[str] = []

    def dying(self: Any) -> None:
        for name in checkpoints:
            (out.with_suffix(".training") / name).touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "run", dying)
        with pytest.raises(KeyboardInterrupt):
            train(request(trace, out), Bar())
        checkpoints.append("state")
        with pytest.raises(KeyboardInterrupt):  # nothing was lost by what ended before its first checkpoint
            train(request(trace, out, *QUICK, "seed=8"), Bar())
    with pytest.raises(ConfigError, match="other data or options"):
        train(request(trace, out, *QUICK, "seed=9"), Bar())


def test_early_stopping_keeps_the_best_epoch(trace: Path, tmp_path: Path) -> None:
    given = ("hidden=24", "epochs=40", "block=64", "batch=16", "learning_rate=0.05", "patience=1")
    artifact = train(request(trace, tmp_path / "p.safetensors", *given), Bar())
    assert artifact.metrics["epochs"] < 40
    lines = (tmp_path / "p.curve.jsonl").read_text().splitlines()
    judged = [json.loads(line)["validation"]["recall_at_k"] for line in lines if "validation" in line]
    assert len(judged) == artifact.metrics["epochs"]
    assert artifact.metrics["recall_at_k"] == max(judged)
    assert judged.index(max(judged)) + 1 == artifact.metrics["best_epoch"]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("history-mlp", ("widow=3",), "unknown option 'widow'; choose from: .*window"),
        ("history-lstm", ("window=3",), "unknown option 'window'"),
        ("pre-attention", ("loss=hinge",), "unknown loss 'hinge'; choose from: mse, weighted-bce, focal, ranking-bce"),
        ("pre-attention", ("lookahead=1",), "unknown lookahead 1; choose from: 0"),
        ("markov", ("lookahead=99",), "lookahead 99: at most 4 with 4 MoE layers"),
        ("history-mlp", ("epochs=0",), "epochs=0 must be at least 1"),
        ("next-gate", (), "needs no training"),
        ("nonsense", (), "unknown trainer 'nonsense'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    name: str, given: tuple[str, ...], message: str, trace: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(Request(name, (trace,), tmp_path / "p.safetensors", given), Bar())
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="'seed' is given twice"):
        merge_options(["seed=1"], seed=2)


def test_options_of_a_fleet_name_their_method() -> None:
    assert jobs(["markov"], ["markov:smoothing=2"])[0].given == ("smoothing=2",)
    assert [job.given for job in jobs(["quasi-hidden", "markov"], [], "here")] == [("model=here",), ()]
    with pytest.raises(ConfigError, match="none of markov runs the model"):
        jobs(["markov"], [], "here")
    with pytest.raises(ConfigError, match="NAME:key=value"):
        jobs(["markov"], ["smoothing=2"])
    with pytest.raises(ConfigError, match="unknown predictor 'x'"):
        jobs(["x"], [])


class Seen:
    """A fleet's bar that keeps what it is told."""

    def __init__(self) -> None:
        self.standings: list[Standing] = []
        self.outcomes: list[Outcome] = []

    def started(self, job: Job) -> None: ...

    def stands(self, job: Job, at: Standing) -> None:
        self.standings.append(at)

    def ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


def test_a_fleet_that_is_silent_while_a_method_is_trained(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "POLL_SECONDS", 0.02)
    seen = Seen()
    given = [f"history-mlp:{text}" for text in ("hidden=24", "epochs=60", "patience=60", "block=64", "batch=8")]
    train_all(jobs(["history-mlp"], given), [trace], tmp_path / "zoo", 1, 1, seen)
    assert not seen.outcomes[0].error
    training = [at for at in seen.standings if at.stage == "training" and at.epoch]
    assert training, seen.standings
    assert all(at.total and 0 <= at.done <= at.total for at in training)
    assert [at.done for at in training] == sorted(at.done for at in training)
    assert training[-1].loss is not None
    assert list((tmp_path / "zoo").glob("*.training")) == []


def test_the_end_of_a_method_is_told_with_its_numbers() -> None:
    told = _told(Outcome("a", "a", 12.3, metrics={"recall_at_k": 0.5, "top1": None, "epochs": 3}))
    assert told == "a: recall at k 0.500 (12 s)"
    assert _told(Outcome("a", "a", 1.0, error="no trace")) == "a: failed: no trace (1 s)"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    return made_trace(tmp_path / "bare", prompts=40, seed=3, features=())


def test_a_fleet_goes_on_without_the_method_that_fails(bare: Path, tmp_path: Path) -> None:
    """The trace has no hidden states: pre-attention must fail, and say why, and the others must be there."""
    out = tmp_path / "zoo"
    command = [sys.executable, "-m", "foregate", "train", "--all", "--only", "popularity,pre-attention,markov"]
    command += ["--trace", str(bare), "--out", str(out), "--jobs", "2", "--threads", "1", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "1 of 3 failed: pre-attention" in ended.stderr
    trained = {entry["name"]: entry for entry in json.loads(ended.stdout)["trained"]}
    assert "traced without pre_attention" in trained["pre-attention"]["error"]
    assert {name for name, entry in trained.items() if not entry["error"]} == {"popularity", "markov"}
    assert sorted(path.name for path in out.glob(f"*{run.SUFFIX}")) == ["markov.safetensors", "popularity.safetensors"]
