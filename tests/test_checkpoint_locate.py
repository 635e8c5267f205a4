"""From what a user types to a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from foregate.checkpoint import locate as module
from foregate.checkpoint.locate import locate
from foregate.errors import CheckpointError


def refusal(model: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[dict[str, Any]]:
    """Replace the hub by ``answer``: an exception, or a directory. Returns the calls."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(model: str, **options: Any) -> str:
        calls.append({"model": model, **options})
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


def test_existing_directory(tmp_path: Path) -> None:
    assert locate(str(tmp_path)) == tmp_path


def test_directory_below_the_current_one_that_looks_like_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("org/model") == Path("org/model")


def test_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "model",
    [
        "/no/such/directory",
        "./gone",
        "../gone",
        "a/b/c",
        "models/",
        "",
        " ",
        "~/gone",
        "a b",
        "~nobody-here/x",
        "x" * 5000,
        "/" + "x" * 300,
    ],
)
def test_path_that_does_not_exist(model: str) -> None:
    assert "no such directory" in refusal(model)


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    assert refusal(str(path)) == f"{path} is a file; give the directory of a checkpoint"


def test_reference_is_found_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REFERENCE_WEIGHTS", tmp_path)
    assert "reference model is not" in refusal("reference")
    (tmp_path / "config.json").touch()
    assert locate("reference") == tmp_path


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nto host"), LocalEntryNotFoundError("offline"), ValueError()]
)
def test_unreachable_hub_names_the_model(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, error)
    assert refusal("org/model").startswith("org/model is neither a directory nor a model that the hub gives: ")


def test_unknown_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx2

    request = httpx2.Request("GET", "https://hub")
    hub(monkeypatch, RepositoryNotFoundError("404 Not Found", response=httpx2.Response(404, request=request)))
    assert "org/gone is neither" in refusal("org/gone")


def test_downloads_the_shards_of_the_index_and_no_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    calls = hub(monkeypatch, tmp_path)
    assert locate("org/model") == tmp_path
    first, second = calls
    assert not any("safetensors" in pattern for pattern in first["allow_patterns"])
    assert second["allow_patterns"][:2] == ["model-1.safetensors", "model-2.safetensors"]
    assert second["ignore_patterns"] == ["*/*"]


def test_downloads_the_single_file_where_there_is_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch, tmp_path)
    locate("gpt2")
    assert calls[1]["allow_patterns"][0] == "model.safetensors"
