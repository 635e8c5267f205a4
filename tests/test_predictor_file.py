"""Predictor files: what goes in comes out, damage and foreign models are refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from foregate.checkpoint.locate import locate
from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.origin import original_fingerprint
from foregate.errors import CheckpointError, PredictorError
from foregate.predictors.file import FORMAT, KEY, Artifact, ModelIdentity, load, save

MODEL = ModelIdentity("tiny", "a" * 32, (8, 8, 8), 2, 16)


def artifact() -> Artifact:
    table = np.arange(24, dtype=np.float32).reshape(3, 8)
    return Artifact(
        method="popularity",
        model=MODEL,
        lookahead=2,
        arrays={"counts": table, "turned": table.T, "ids": np.arange(3), "empty": np.zeros((0, 4), np.float16)},
        options={"window": 10, "smoothing": 0.5, "words": ["a", "ü"]},
        features=("residual",),
        metrics={"recall_at_k": 0.5},
        traces=("code", "prose"),
        trace_hash="b" * 32,
        seed=7,
    )


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    save(tmp_path / "p.safetensors", artifact())
    found = load(tmp_path / "p.safetensors")
    assert found.arrays.keys() == artifact().arrays.keys()
    for name, array in artifact().arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype
    assert replace(found, arrays={}, path="") == replace(artifact(), arrays={})


def test_same_content_is_the_same_bytes_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    save(tmp_path / "one", artifact())
    save(tmp_path / "two", artifact())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match=r"nowhere.p: cannot be written"):
        save(tmp_path / "nowhere" / "p", artifact())


def saved_bytes(tmp_path: Path) -> bytes:
    save(tmp_path / "whole", artifact())
    return (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused_by_name(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(saved_bytes(tmp_path)[:cut])
    with pytest.raises(PredictorError, match=f"^{path}: damaged") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "junk", [b"\xff" * 64, b"{}" * 50, np.random.default_rng(0).bytes(4096)], ids=["ff", "{}", "noise"]
)
def test_junk_is_refused_by_name(junk: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(junk)
    with pytest.raises(PredictorError, match=f"^{path}: damaged"):
        load(path)


def test_no_file_a_directory_and_weights_of_a_model_are_no_predictor(tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match="no such predictor file"):
        load(tmp_path / "absent")
    with pytest.raises(PredictorError, match="no predictor file"):
        load(tmp_path)
    save_file({"w": np.zeros(3)}, tmp_path / "weights")
    reference = locate("reference") / "model.safetensors"  # bfloat16, which numpy does not have
    for weights in (tmp_path / "weights", reference):
        with pytest.raises(PredictorError, match="no predictor of Foregate"):
            load(weights)


@pytest.mark.parametrize(
    "header",
    ["", "[]", "{}", "null", "[" * 100_000]
    + [json.dumps({"format": FORMAT, **wrong}) for wrong in ({}, {"method": 3}, {"method": "x", "model": []})]
    + [json.dumps({"format": "foregate-predictor-99"})],
    ids=lambda text: text[:50] or "empty",
)
def test_a_header_that_makes_no_sense_is_refused_by_name(header: str, tmp_path: Path) -> None:
    path = tmp_path / "p"
    save_file({"w": np.zeros(3)}, path, {KEY: header})
    with pytest.raises(PredictorError, match=f"^{path}: ") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_arrays_and_options_are_checked_when_they_are_asked_for() -> None:
    found = artifact()
    assert found.array("counts", (3, None)).shape == (3, 8)
    assert found.option("window", int) == 10
    assert found.option("window", float) == 10
    bad = replace(found, arrays={"counts": np.full((3, 8), np.nan, np.float32)})
    for refuse, words in (
        (lambda: found.array("weights", (3,)), "'weights' is missing"),
        (lambda: found.array("counts", (3, 9)), r"shape \(3, 8\), not \(3, 9\)"),
        (lambda: found.array("counts", (3,)), r"not \(3\)"),
        (lambda: found.array("ids", (3,)), "dtype int64"),
        (lambda: bad.array("counts", (3, 8)), "not finite"),
        (lambda: found.option("words", int), "'words' is"),
        (lambda: found.option("missing", str), "'missing' is None"),
    ):
        with pytest.raises(PredictorError, match=words):
            refuse()


def test_another_model_is_refused_and_an_inflated_copy_is_not() -> None:
    found = artifact()
    found.check_model(MODEL)
    found.check_model(replace(MODEL, fingerprint="c" * 32, original=MODEL.fingerprint, hidden_size=64))
    with pytest.raises(PredictorError, match=r"made for tiny \(fingerprint a{12}\), not for other \(c{12}\)"):
        found.check_model(replace(MODEL, name="other", fingerprint="c" * 32))
    with pytest.raises(PredictorError, match="inflated from dddddddddddd"):
        found.check_model(replace(MODEL, fingerprint="c" * 32, original="d" * 32))
    with pytest.raises(PredictorError, match="experts per layer"):
        found.check_model(replace(MODEL, experts=(8, 8)))
    with pytest.raises(PredictorError, match="hidden size"):
        found.check_model(replace(MODEL, hidden_size=8))


def test_an_inflated_checkpoint_names_its_original(tmp_path: Path) -> None:
    from foregate.testing.inflate import inflate
    from foregate.testing.tiny import build

    plain = build("qwen3_moe", tmp_path / "plain")
    large = inflate(plain, tmp_path / "large", hidden_factor=4)
    assert original_fingerprint(large) == open_checkpoint(plain).fingerprint
    assert original_fingerprint(plain) == ""
    (large / "inflation.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        original_fingerprint(large)
