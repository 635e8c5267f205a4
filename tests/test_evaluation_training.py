"""Predictor files that were trained on what they are to be judged on, and files of which nobody can know."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foregate.cli.main import app
from foregate.errors import PredictorError
from foregate.evaluation.candidates import Candidate
from foregate.evaluation.held_out import HeldOut
from foregate.evaluation.provenance import BY_HASH, BY_PROMPTS, check_training, provenance
from foregate.predictors.file import Artifact, load, save
from foregate.trace.sample import SAMPLE
from foregate.training.dataset import TEST, TRAIN, VALIDATION, content_hash, side

Change = Callable[[Artifact, HeldOut], Artifact]
QUICK = ("--budget", "25%", "--policies", "lru", "--tokens", "60", "--sim-tokens", "20", "--no-figures", "--json")


@pytest.fixture(scope="module")
def held() -> HeldOut:
    return HeldOut([SAMPLE], 100)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "popularity.safetensors"
    arguments = ["train", "--predictor", "popularity", "--trace", "sample", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    return out


def contents(held: HeldOut, *sides: str) -> tuple[str, ...]:
    return tuple(entry.content for _, entry in held.found if side(entry) in sides)


def unlisted(file: Artifact, trace_hash: str | None = None) -> Artifact:
    """As files were before they listed their prompts."""
    return replace(file, prompts=(), trace_hash=trace_hash or file.trace_hash)


def test_a_file_that_does_not_say_which_prompts_it_saw(trained: Path, held: HeldOut) -> None:
    assert set(load(trained).prompts) == set(contents(held, TRAIN, VALIDATION))
    found = check_training(load(trained), held)
    assert found["verified_by"] == BY_PROMPTS
    assert set(found["of_domain"].values()) == {1.0}


def test_an_older_file_is_known_by_the_hash_of_its_data(trained: Path, held: HeldOut) -> None:
    found = check_training(unlisted(load(trained)), held)
    assert found["verified_by"] == BY_HASH
    assert set(found["of_domain"].values()) == {1.0}


def test_training_in_another_domain_that_passes_for_training_in_this(trained: Path, held: HeldOut) -> None:
    only = [entry for _, entry in held.found if side(entry) == TRAIN]
    domains = list(dict.fromkeys(entry.domain for entry in only))
    kept = tuple(entry.content for entry in only if entry.domain == domains[0])
    found = check_training(replace(load(trained), prompts=kept), held)
    assert found["of_domain"] == {domain: float(domain == domains[0]) for domain in domains}


@pytest.mark.parametrize(
    "change",
    [
        lambda file, held: replace(file, prompts=(*file.prompts, held.items[0][1].content)),
        lambda file, held: unlisted(file, trace_hash=content_hash([entry for _, entry in held.found])),
        lambda file, held: unlisted(file, trace_hash=content_hash([e for _, e in held.found if side(e) == TEST])),
    ],
    ids=["one prompt", "all prompts", "the test side"],
)
def test_a_file_that_was_trained_on_what_it_is_judged_on(
    change: Change, trained: Path, held: HeldOut, tmp_path: Path
) -> None:
    save(tmp_path / "leaky.safetensors", change(load(trained), held))
    with pytest.raises(
        PredictorError, match=r"leaky.safetensors: trained on \d+ of the \d+ prompts that are evaluated"
    ):
        check_training(load(tmp_path / "leaky.safetensors"), held)
    arguments = ["evaluate", "--trace", str(SAMPLE), "--predictor", str(tmp_path / "leaky.safetensors"), *QUICK]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code != 0
    assert not done.stdout


def test_a_file_of_another_model_that_is_refused_after_the_work(trained: Path, held: HeldOut, tmp_path: Path) -> None:
    file = load(trained)
    save(tmp_path / "foreign.safetensors", replace(file, model=replace(file.model, fingerprint="f" * 64)))
    one = Candidate("foreign", (str(tmp_path / "foreign.safetensors"),))
    with pytest.raises(PredictorError, match=r"foreign.safetensors: made for .* \(fingerprint ffffffffffff\), not for"):
        provenance(one, held)


def test_unknown_training_data_that_passes_in_silence(trained: Path, tmp_path: Path) -> None:
    save(tmp_path / "unknown.safetensors", unlisted(load(trained), trace_hash="0" * 32))
    arguments = ["evaluate", "--trace", "sample", "--predictor", str(tmp_path / "unknown.safetensors")]
    done = CliRunner().invoke(app, [*arguments, "--predictor", str(trained), *QUICK], catch_exceptions=False)
    found = json.loads(done.stdout.splitlines()[-1])["predictors"]
    assert found["unknown"]["training"] == [{"verified_by": None, "of_domain": None}]
    assert found["popularity"]["training"][0]["verified_by"] == BY_PROMPTS
    assert [line for line in done.stderr.splitlines() if line.startswith("warning") and line.endswith(": unknown")]
