"""The GGUF exporter: what is in the file is what is in the checkpoint. llama.cpp itself: tests/test_rivals.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from foregate.checkpoint.locate import locate
from foregate.errors import CheckpointError, ConfigError, UnsupportedModelError
from foregate.testing.tiny import build

gguf = pytest.importorskip("gguf")

from foregate.bench.rivals.gguf_export import export  # noqa: E402

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.2.attn_q.weight": "model.layers.2.self_attn.q_proj.weight",
    "blk.2.attn_k.weight": "model.layers.2.self_attn.k_proj.weight",
    "blk.2.attn_v.weight": "model.layers.2.self_attn.v_proj.weight",
    "blk.2.attn_output.weight": "model.layers.2.self_attn.o_proj.weight",
    "blk.2.attn_q_norm.weight": "model.layers.2.self_attn.q_norm.weight",
    "blk.2.attn_k_norm.weight": "model.layers.2.self_attn.k_norm.weight",
    "blk.2.attn_norm.weight": "model.layers.2.input_layernorm.weight",
    "blk.2.ffn_norm.weight": "model.layers.2.post_attention_layernorm.weight",
    "blk.2.ffn_gate_inp.weight": "model.layers.2.mlp.gate.weight",
}
"""Some of them written out, so that a wrong map of names cannot agree with itself."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("moe") / "moe"
    return build("qwen3_moe", directory, dtype="bfloat16", mlp_only_layers=[], tie_word_embeddings=False)


def stored(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a GGUF file, in fp32, as [experts, rows, columns]."""
    reader = gguf.GGUFReader(path)
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def original(model: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.float().numpy() for name, tensor in load_file(model / "model.safetensors").items()}


def edited(model: Path, tmp_path: Path, **changes: Any) -> Path:
    """A copy of the checkpoint with other values in its config.json."""
    copy = tmp_path / "edited"
    shutil.copytree(model, copy)
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**raw, **changes}))
    return copy


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_every_weight_keeps_its_value_and_its_expert(model: Path, tmp_path: Path, dtype: str) -> None:
    found, wanted = stored(export(model, tmp_path / "m.gguf", dtype)), original(model)
    for name, source in NAMES.items():
        assert np.array_equal(found[name], wanted[source]), name
    for kind in ("gate", "up", "down"):
        for expert in (0, 9, 15):
            source = wanted[f"model.layers.3.mlp.experts.{expert}.{kind}_proj.weight"]
            assert np.array_equal(found[f"blk.3.ffn_{kind}_exps.weight"][expert], source)
    assert sum(array.size for array in found.values()) == sum(array.size for array in wanted.values())


def test_q8_0_is_within_half_a_step_of_its_block(model: Path, tmp_path: Path) -> None:
    path = export(model, tmp_path / "m.gguf", "q8_0")
    found, wanted = stored(path), original(model)
    for expert in range(16):
        source = wanted[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"].reshape(-1, 32)
        step = np.abs(source).max(axis=1, keepdims=True) / 127
        error = np.abs(found["blk.1.ffn_up_exps.weight"][expert].reshape(-1, 32) - source)
        # the scale is a half-precision number: 2^-11 of up to 127 steps
        assert (error <= step * (0.5 + 127 / 2048) + 1e-9).all()
        assert error.max() > 0


def test_the_router_and_norms_stay_in_fp32(model: Path, tmp_path: Path) -> None:
    """A router in Q8_0 would choose other experts, and llama.cpp refuses quantised norms."""
    found = types(export(model, tmp_path / "m.gguf", "q8_0", "bf16"))
    assert found["blk.0.ffn_gate_inp.weight"] == found["blk.0.attn_norm.weight"] == "F32"
    assert found["blk.0.ffn_down_exps.weight"] == "Q8_0"
    assert found["blk.0.attn_q.weight"] == found["token_embd.weight"] == "BF16"


def test_head_sizes_are_stated_where_hidden_over_heads_is_wrong(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(export(locate("reference"), tmp_path / "m.gguf"))
    fields = {name: reader.get_field(f"qwen3moe.{name}") for name in ("attention.key_length", "attention.value_length")}
    assert {name: field.contents() for name, field in fields.items() if field} == dict.fromkeys(fields, 64)
    assert reader.get_field("tokenizer.ggml.pre").contents() == "starcoder"
    assert reader.get_field("qwen3moe.attention.layer_norm_rms_epsilon").contents() == pytest.approx(1e-6)
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}  # tied


def test_tokens_are_numbered_as_in_the_checkpoint(model: Path, tmp_path: Path) -> None:
    names = gguf.GGUFReader(export(model, tmp_path / "m.gguf")).get_field("tokenizer.ggml.tokens").contents()
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(names) == 288
    assert {name: names[index] for name, index in vocabulary.items()} == {name: name for name in vocabulary}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "olmoe"}, "model type 'olmoe'"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
    ],
)
def test_what_the_file_cannot_say_is_refused_by_name(
    model: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        export(edited(model, tmp_path, **changes), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_transformers_default_of_an_absent_setting_is_checked_too(model: Path, tmp_path: Path) -> None:
    copy = edited(model, tmp_path)
    raw = json.loads((copy / "config.json").read_text())
    del raw["norm_topk_prob"]  # transformers then takes False, llama.cpp True
    (copy / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match="norm_topk_prob"):
        export(copy, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("model.layers.0.mlp.experts.7.up_proj.weight", r"blk\.0\.ffn_up_exps\.weight.*\[7\]"),
        ("model.layers.2.self_attn.q_norm.weight", r"blk\.2\.attn_q_norm\.weight"),
    ],
)
def test_a_missing_tensor_is_named_and_leaves_no_file(model: Path, tmp_path: Path, lost: str, said: str) -> None:
    copy = edited(model, tmp_path)
    tensors = {name: tensor for name, tensor in load_file(copy / "model.safetensors").items() if name != lost}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        export(copy, tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edited"]


def test_a_tensor_without_a_place_is_not_dropped(model: Path, tmp_path: Path) -> None:
    copy = edited(model, tmp_path)
    tensors = {**load_file(copy / "model.safetensors"), "model.layers.0.self_attn.sinks": torch.zeros(4)}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="sinks"):
        export(copy, tmp_path / "m.gguf")


def test_a_tokenizer_with_an_unknown_split_is_refused_and_can_be_left_out(model: Path, tmp_path: Path) -> None:
    copy = edited(model, tmp_path)
    content = json.loads((copy / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError, match="Whitespace"):
        export(copy, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(export(copy, tmp_path / "m.gguf", tokenizer=False))
    assert reader.get_field("tokenizer.ggml.model").contents() == "no_vocab"


def test_a_finished_file_is_kept_and_another_one_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    out = export(model, tmp_path / "m.gguf", "bf16")
    written = out.stat().st_mtime_ns
    assert export(model, out, "bf16").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="made from something else"):
        export(model, out, "f32")
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="no GGUF file"):
        export(model, tmp_path / "junk.gguf")


def test_progress_counts_every_byte_once(model: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    export(model, tmp_path / "m.gguf", progress=lambda done, total: told.append((done, total)))
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_rows_that_no_block_divides_are_refused(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    odd = build("qwen3_moe", tmp_path / "odd", mlp_only_layers=[], moe_intermediate_size=24)
    with pytest.raises(UnsupportedModelError, match="multiple of 32"):
        export(odd, tmp_path / "m.gguf", "q8_0")
