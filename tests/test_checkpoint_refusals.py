"""Models that Foregate cannot run: refused by name, in one line, before a weight is read."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.pack import pack
from foregate.errors import CheckpointError, UnsupportedModelError
from foregate.testing.tiny import REFUSED
from test_checkpoint_support import edit_header, edit_json, edit_tensors, tiny

SUPPORTED_HERE = {"llama4_text"}
"""Experts that can be read, whatever the engine makes of them."""


def refusal(directory: Path, kind: type[CheckpointError] = UnsupportedModelError) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def config_only(directory: Path, model_type: str, **values: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    AutoConfig.for_model(model_type, **values).save_pretrained(directory)
    return directory


def test_dense_model(tmp_path: Path) -> None:
    assert "'llama' is not a Mixture-of-Experts model" in refusal(tiny(tmp_path, "llama"))


@pytest.mark.parametrize("family", sorted({*REFUSED} - SUPPORTED_HERE - {"llama"}))
def test_experts_in_a_form_of_their_own(family: str, tmp_path: Path) -> None:
    message = refusal(tiny(tmp_path, family))
    assert f"{family!r} keeps its experts in a form that is not supported" in message


@pytest.mark.parametrize("model_type", ["switch_transformers", "nllb-moe", "qwen3_vl_moe", "step3p7"])
def test_no_causal_language_model(model_type: str, tmp_path: Path) -> None:
    assert f"{model_type!r} is not supported" in refusal(config_only(tmp_path, model_type))


def test_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "brand_new_moe"}))
    assert "brand_new_moe" in refusal(tmp_path)


def test_custom_code_is_never_run(tmp_path: Path) -> None:
    config = {
        "model_type": "brand_new_moe",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "brand_new_moe" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("method", ["mxfp4", "fp8", "gptq", "awq", "bitsandbytes"])
def test_quantised(method: str, tmp_path: Path) -> None:
    edit_json(tiny(tmp_path, "gpt_oss") / "config.json", quantization_config={"quant_method": method})
    assert refusal(tmp_path) == (
        f"model type 'gpt_oss' is quantised with {method}; dequantise the checkpoint first (save it as bfloat16)"
    )


def test_quantised_text_part(tmp_path: Path) -> None:
    config_only(tmp_path, "llama4")
    config = json.loads((tmp_path / "config.json").read_text())
    edit_json(tmp_path / "config.json", text_config={**config["text_config"], "quantization_config": {"bits": 4}})
    assert "'llama4' is quantised with an unnamed method" in refusal(tmp_path)


def test_config_whose_numbers_do_not_fit(tmp_path: Path) -> None:
    edit_json(tiny(tmp_path) / "config.json", hidden_act="no_such_activation")
    assert "'olmoe'" in refusal(tmp_path)


@pytest.mark.parametrize("top_k", [0, 17])
def test_impossible_experts_per_token(tmp_path: Path, top_k: int) -> None:
    edit_json(tiny(tmp_path) / "config.json", num_experts_per_tok=top_k)
    assert f"the experts per token are {top_k}, of 16 experts" in refusal(tmp_path)


def test_config_of_the_wrong_type(tmp_path: Path) -> None:
    edit_json(tiny(tmp_path) / "config.json", num_hidden_layers="four")
    assert "'olmoe'" in refusal(tmp_path)


def test_dtype_that_no_model_has(tmp_path: Path) -> None:
    edit_json(tiny(tmp_path) / "config.json", dtype="float64")
    assert "dtype" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": 3}', '{"hidden_size": 3}', "[" * 100_000])
def test_junk_config(tmp_path: Path, content: str) -> None:
    (tiny(tmp_path) / "config.json").write_text(content)
    assert "config.json" in refusal(tmp_path, CheckpointError)


@pytest.mark.parametrize("depth", [100, 450, 900])
def test_config_that_is_nested_deeply(tmp_path: Path, depth: int) -> None:
    edit_json(tiny(tmp_path) / "config.json", extra=json.loads("[" * depth + "]" * depth))
    with contextlib.suppress(CheckpointError):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [5, [], {}, "", True])
def test_weights_that_are_no_file_name(tmp_path: Path, value: Any) -> None:
    edit_json(tiny(tmp_path) / "config.json", transformers_weights=value)
    assert "config.json: " in refusal(tmp_path, CheckpointError)


@pytest.mark.parametrize("length", [0, -1])
def test_context_of_no_positions(tmp_path: Path, length: int) -> None:
    edit_json(tiny(tmp_path) / "config.json", max_position_embeddings=length)
    assert f"a context of {length} positions" in refusal(tmp_path, CheckpointError)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "a JSON list, not an object"),
        ('{"eos_token_id": "abc"}', "eos_token_id is 'abc'"),
        ('{"eos_token_id": [1, "abc"]}', "neither a token id nor a list of them"),
        ('{"eos_token_id": 1.5}', "eos_token_id is '1.5'"),
        ('{"eos_token_id": true}', "neither a token id nor a list of them"),
    ],
)
def test_junk_generation_config(tmp_path: Path, packed: bool, content: str, message: str) -> None:
    directory = tiny(tmp_path / "source")
    if packed:
        directory = pack(directory, tmp_path / "out").directory
    (directory / "generation_config.json").write_text(content)
    found = refusal(directory, CheckpointError)
    assert "generation_config.json" in found
    assert message in found


@pytest.mark.parametrize("content", [None, "{}", '{"eos_token_id": null}', '{"eos_token_id": [1, 2]}'])
def test_sound_generation_config(tmp_path: Path, content: str | None) -> None:
    path = tiny(tmp_path) / "generation_config.json"
    path.unlink() if content is None else path.write_text(content)
    open_checkpoint(tmp_path)


def relabel(directory: Path, name: str, dtype: str, shape: list[int] | None = None) -> None:
    """Say in the header that a tensor of BF16 is something else."""
    changes = {"dtype": dtype, **({"shape": shape} if shape else {})}
    edit_header(directory / "model.safetensors", lambda header: header[name].update(changes))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.gate.weight", "lm_head.weight"])
@pytest.mark.parametrize("dtype", ["I16", "U16"])
def test_integers_in_the_place_of_numbers(tmp_path: Path, name: str, dtype: str) -> None:
    relabel(tiny(tmp_path), name, dtype)
    assert f"model.safetensors: tensor {name!r} is {dtype}, but {name} holds" in refusal(tmp_path, CheckpointError)


def test_integers_in_the_place_of_a_stored_buffer(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tiny(tmp_path, "deepseek_v3")
    edit_tensors(tmp_path, lambda tensors: {**tensors, name: tensors[name].to(torch.int32)})
    assert f"tensor {name!r} is I32" in refusal(tmp_path, CheckpointError)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_any_float_is_a_number(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.norm.weight"
    edit_tensors(tiny(tmp_path), lambda tensors: {**tensors, name: tensors[name].to(dtype)})
    open_checkpoint(tmp_path)


def test_dense_dtypes_of_a_pack(tmp_path: Path) -> None:
    packed = pack(tiny(tmp_path / "source"), tmp_path / "out").directory
    relabel(packed, "model.norm.weight", "I16")
    assert "tensor 'model.norm.weight' is I16" in refusal(packed, CheckpointError)


def test_vocabulary_that_the_file_does_not_have(tmp_path: Path) -> None:
    edit_json(tiny(tmp_path) / "config.json", vocab_size=300)
    message = refusal(tmp_path, CheckpointError)
    assert "is [288, 64], but by config.json" in message
    assert message.endswith("is [300, 64]")


def test_a_dense_tensor_of_another_shape(tmp_path: Path) -> None:
    relabel(tiny(tmp_path), "model.norm.weight", "BF16", [8, 8])
    assert "tensor 'model.norm.weight' is [8, 8], but by config.json model.norm.weight is [64]" in refusal(
        tmp_path, CheckpointError
    )


def test_no_config(tmp_path: Path) -> None:
    assert "config.json: file is missing" in refusal(tmp_path, CheckpointError)


def test_no_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone", CheckpointError) == f"{tmp_path}/gone: no such directory"
