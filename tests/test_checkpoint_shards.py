"""Which files a checkpoint is made of, and what is wrong when they do not fit together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.shards import INDEX, SINGLE
from foregate.errors import CheckpointError, UnsupportedModelError
from foregate.testing.tiny import no_progress_bar
from test_checkpoint_support import check_against_transformers, edit_json, edit_tensors, load, tiny


def sharded(directory: Path) -> Path:
    """A tiny checkpoint in four or more files: experts of one layer, even of one parameter, in different ones."""
    tiny(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    (directory / SINGLE).unlink()
    with no_progress_bar():
        model.save_pretrained(directory, max_shard_size="200KB")
    assert len(list(directory.glob("*.safetensors"))) >= 4
    return directory


def test_sharded_checkpoint(tmp_path: Path) -> None:
    checkpoint = check_against_transformers(sharded(tmp_path))
    assert len(checkpoint.shards.files) >= 4


def test_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    sharded(tmp_path / "shards")
    tiny(tmp_path / "single")
    shutil.copyfile(tmp_path / "single" / SINGLE, tmp_path / "shards" / SINGLE)
    assert [path.name for path in open_checkpoint(tmp_path / "shards").shards.files] == [SINGLE]


def test_missing_shard_is_named(tmp_path: Path) -> None:
    victim = sorted(sharded(tmp_path).glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=rf"{victim.name}: shard is missing"):
        open_checkpoint(tmp_path)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    victim = sorted(sharded(tmp_path).glob("*.safetensors"))[2]
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{victim.name}: truncated: expected \d+ bytes, found \d+"):
        open_checkpoint(tmp_path)


def test_index_that_names_a_tensor_nobody_has(tmp_path: Path) -> None:
    index = sharded(tmp_path) / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = next(iter(weight_map.values()))
    edit_json(index, weight_map={**weight_map, "model.ghost.weight": shard})
    with pytest.raises(CheckpointError, match=rf"{INDEX}: names tensor 'model.ghost.weight' in {shard}"):
        open_checkpoint(tmp_path)


def test_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    index = sharded(tmp_path) / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    name, shard = next(iter(weight_map.items()))
    wrong = next(other for other in weight_map.values() if other != shard)
    edit_json(index, weight_map={**weight_map, name: wrong})
    with pytest.raises(CheckpointError, match=f"names tensor '{name}' in {wrong}"):
        open_checkpoint(tmp_path)


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    first, second = sorted(sharded(tmp_path).glob("*.safetensors"))[:2]
    edit_tensors(tmp_path, lambda tensors: {**tensors, "lm_head.weight": torch.zeros(2)}, first.name)
    edit_tensors(tmp_path, lambda tensors: {**tensors, "lm_head.weight": torch.zeros(2)}, second.name)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is also in"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "[" * 100_000, '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_junk_index(tmp_path: Path, content: str) -> None:
    (sharded(tmp_path) / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "weights.bin"])
def test_index_must_stay_in_its_directory(tmp_path: Path, name: str) -> None:
    edit_json(sharded(tmp_path) / INDEX, weight_map={"a": name})
    with pytest.raises(CheckpointError, match="is not a safetensors file of this directory"):
        open_checkpoint(tmp_path)


def test_the_file_that_the_config_names(tmp_path: Path) -> None:
    """``transformers_weights`` in config.json beats model.safetensors, for transformers and for us."""
    tiny(tmp_path / "other", seed=1)
    tiny(tmp_path / "model", seed=0)
    shutil.copyfile(tmp_path / "other" / SINGLE, tmp_path / "model" / "special.safetensors")
    edit_json(tmp_path / "model" / "config.json", transformers_weights="special.safetensors")
    checkpoint = check_against_transformers(tmp_path / "model")
    assert [path.name for path in checkpoint.shards.files] == ["special.safetensors"]


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tiny(tmp_path) / SINGLE).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="convert them to safetensors"):
        open_checkpoint(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tiny(tmp_path) / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        open_checkpoint(tmp_path)


def test_tensors_that_the_model_does_not_have_are_unused(tmp_path: Path) -> None:
    """Multi-token-prediction layers of DeepSeek checkpoints, vision towers: neither experts nor dense."""
    extra = "model.layers.61.mlp.experts.0.gate_proj.weight"
    edit_tensors(tiny(tmp_path), lambda tensors: {**tensors, extra: torch.zeros(4, 4)})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.sources is not None
    assert checkpoint.sources.unused == (extra,)
    assert extra not in checkpoint.dense


def test_dtype_of_the_weights_where_the_config_names_none(tmp_path: Path) -> None:
    edit_json(tiny(tmp_path, dtype="float16") / "config.json", dtype=None, torch_dtype=None)
    checkpoint = check_against_transformers(tmp_path)
    assert checkpoint.spec.dtype == "F16"
    assert load(tmp_path).dtype == torch.float16


def test_other_tensors_may_have_any_dtype(tmp_path: Path) -> None:
    """Dense tensors may have any dtype that safetensors knows."""
    edit_tensors(tiny(tmp_path), lambda tensors: {**tensors, "extra.table": torch.zeros(3, dtype=torch.int64)})
    assert "extra.table" in open_checkpoint(tmp_path).shards.tensors


def test_empty_weight_file_has_no_experts(tmp_path: Path) -> None:
    save_file({}, tiny(tmp_path) / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="all 16 experts of decoder layer 0 are missing"):
        open_checkpoint(tmp_path)
