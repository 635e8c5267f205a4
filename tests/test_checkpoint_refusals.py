"""Models that Foregate cannot run: refused by name, in one line, before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from foregate.checkpoint.opening import open_checkpoint
from foregate.errors import CheckpointError, UnsupportedModelError
from foregate.testing.tiny import REFUSED
from test_checkpoint_support import edit_json, tiny

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


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": 3}', '{"hidden_size": 3}'])
def test_junk_config(tmp_path: Path, content: str) -> None:
    (tiny(tmp_path) / "config.json").write_text(content)
    assert "config.json" in refusal(tmp_path, CheckpointError)


def test_no_config(tmp_path: Path) -> None:
    assert "config.json: file is missing" in refusal(tmp_path, CheckpointError)


def test_no_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone", CheckpointError) == f"{tmp_path}/gone: no such directory"
