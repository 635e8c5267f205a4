"""A model in numbers, and its fingerprint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from foregate.checkpoint.opening import open_checkpoint
from test_checkpoint_support import edit_json, edit_tensors, tiny


def test_numbers_of_a_known_model(tmp_path: Path) -> None:
    spec = open_checkpoint(tiny(tmp_path, "qwen3_moe")).spec
    assert (spec.model_type, spec.architecture, spec.dtype) == ("qwen3_moe", "Qwen3MoeForCausalLM", "BF16")
    assert spec.decoder_layers == 4
    assert spec.moe_layers == (0, 2, 3)  # layer 1 is dense
    assert spec.module_paths[1] == "model.layers.2.mlp.experts"
    assert spec.experts_per_layer == (16, 16, 16)
    assert (spec.layers, spec.experts, spec.top_k) == (3, 48, 4)
    assert (spec.hidden_size, spec.vocab_size, spec.context_length) == (64, 288, 256)
    assert spec.expert_bytes == 2 * (64 * 64 + 64 * 32)
    assert spec.expert_slot_bytes == 12288
    assert spec.total_expert_bytes == 48 * spec.expert_bytes
    assert spec.total_bytes == spec.dense_bytes + spec.total_expert_bytes
    assert spec.bytes_per_token == spec.dense_bytes + 3 * 4 * spec.expert_bytes
    assert spec.layer_budget == 4 * 12288


@pytest.mark.parametrize(
    ("family", "top_k", "shared"),
    [
        ("olmoe", 4, None),
        ("deepseek_v2", 3, 2),
        ("qwen2_moe", 2, 1),
        ("ernie4_5_moe", 2, 1),
        ("aria_text", 2, 1),
        ("hunyuan_v1_moe", 2, None),
        ("gemma4_text", 2, None),
    ],
)
def test_families_name_the_same_things_differently(family: str, top_k: int, shared: int | None, tmp_path: Path) -> None:
    spec = open_checkpoint(tiny(tmp_path, family)).spec
    assert (spec.top_k, spec.shared_experts) == (top_k, shared)


def test_expert_bytes_are_those_of_the_loaded_dtype(tmp_path: Path) -> None:
    """float32 on the disk, bfloat16 in memory."""
    edit_json(tiny(tmp_path, dtype="float32") / "config.json", dtype="bfloat16")
    assert open_checkpoint(tmp_path).spec.expert_bytes == 2 * (64 * 64 + 64 * 32)


def test_fingerprint_does_not_depend_on_the_place_or_the_weights(tmp_path: Path) -> None:
    one = open_checkpoint(tiny(tmp_path / "one", seed=0)).fingerprint
    other = open_checkpoint(tiny(tmp_path / "two", seed=1)).fingerprint
    assert one == other
    shutil.move(tmp_path / "one", tmp_path / "three")
    assert open_checkpoint(tmp_path / "three").fingerprint == one
    assert len(one) == 32


def test_fingerprint_does_not_depend_on_who_saved_the_config(tmp_path: Path) -> None:
    before = open_checkpoint(tiny(tmp_path)).fingerprint
    edit_json(tmp_path / "config.json", transformers_version="4.0.0", _name_or_path="elsewhere")
    assert open_checkpoint(tmp_path).fingerprint == before


def test_fingerprint_changes_with_config_and_tensors(tmp_path: Path) -> None:
    before = open_checkpoint(tiny(tmp_path)).fingerprint
    edit_json(tmp_path / "config.json", rms_norm_eps=1e-3)
    config = open_checkpoint(tmp_path).fingerprint
    edit_tensors(tmp_path, lambda tensors: {**tensors, "extra": torch.zeros(1)})
    assert len({before, config, open_checkpoint(tmp_path).fingerprint}) == 3
