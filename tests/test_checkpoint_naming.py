"""Tensor names and layouts that differ from what ``save_pretrained`` writes today; every one against transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from foregate.checkpoint.numbering import by_expert
from foregate.checkpoint.opening import open_checkpoint
from foregate.errors import CheckpointError
from foregate.testing.families import config_of
from foregate.testing.tiny import no_progress_bar
from test_checkpoint_support import Tensors, check_against_transformers, edit_json, edit_tensors, tiny

EXPERT = re.compile(r"experts\.(\d+)\.(\w+)")


def test_fused_tensors_that_are_in_model_layout_already(tmp_path: Path) -> None:
    def fuse(tensors: Tensors) -> Tensors:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
        dense = {name: tensor for name, tensor in tensors.items() if "experts." not in name}
        fused = {name: tensor for name, tensor in model.state_dict().items() if "experts." in name}
        return {**dense, **fused}

    edit_tensors(tiny(tmp_path), fuse)
    checkpoint = check_against_transformers(tmp_path)
    assert checkpoint.sources is not None
    assert all(source.fused for layer in checkpoint.sources.layers for r in layer.recipes for source in r.sources)


def test_names_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    edit_tensors(tiny(tmp_path), lambda tensors: {n.removeprefix("model."): t for n, t in tensors.items()})
    check_against_transformers(tmp_path)


def test_more_than_ten_experts_are_in_numerical_order(tmp_path: Path) -> None:
    """Expert 10 must not come before expert 2."""
    checkpoint = check_against_transformers(tiny(tmp_path, "olmoe"))
    assert checkpoint.spec.experts_per_layer[0] == 16
    assert checkpoint.sources is not None
    names = [checkpoint.sources.layers[0].segments(expert)[0].tensor for expert in range(16)]
    assert [int(EXPERT.search(name).group(1)) for name in names] == list(range(16))  # type: ignore[union-attr]


def test_more_than_ten_layers_are_in_execution_order(tmp_path: Path) -> None:
    tiny(tmp_path, num_hidden_layers=12, num_experts=4, num_experts_per_tok=2)
    assert open_checkpoint(tmp_path).spec.moe_layers == tuple(range(12))


def test_a_single_expert(tmp_path: Path) -> None:
    check_against_transformers(tiny(tmp_path, num_experts=1, num_experts_per_tok=1))


@pytest.mark.parametrize(
    ("stored", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_weights_are_cast_to_the_dtype_of_the_config(tmp_path: Path, stored: str, wanted: str) -> None:
    edit_json(tiny(tmp_path, dtype=stored) / "config.json", dtype=wanted)
    check_against_transformers(tmp_path)


def test_one_expert_of_another_dtype(tmp_path: Path) -> None:
    def widen(tensors: Tensors) -> Tensors:
        return {n: t.float() if ".layers.2.mlp.experts.5." in n else t for n, t in tensors.items()}

    edit_tensors(tiny(tmp_path), widen)
    check_against_transformers(tmp_path)


@pytest.mark.parametrize("family", ["gemma4", "llama4", "qwen3_5_moe"])
def test_multimodal_checkpoints(family: str, tmp_path: Path) -> None:
    """A text model inside a wrapper, with a vision tower whose tensors are nobody's experts."""
    vision = {
        "llama4": {"image_size": 28, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        "qwen3_5_moe": {"depth": 1, "num_heads": 2, "out_hidden_size": 64},
        "gemma4": {"num_key_value_heads": 2, "head_dim": 16},
    }[family]
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    config = AutoConfig.for_model(family, text_config=config_of(f"{family}_text"), vision_config={**small, **vision})
    save_wrapper(config, tmp_path)
    check_against_transformers(tmp_path)


def save_wrapper(config: object, directory: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    with no_progress_bar():
        model.save_pretrained(directory)


def test_missing_experts_are_named(tmp_path: Path) -> None:
    gone = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (0, 7)]
    edit_tensors(tiny(tmp_path), lambda tensors: {n: t for n, t in tensors.items() if n not in gone})
    with pytest.raises(CheckpointError, match=re.escape(f"expert tensors are missing: {gone[0]}, {gone[1]}")):
        open_checkpoint(tmp_path)


def test_a_whole_missing_projection(tmp_path: Path) -> None:
    edit_tensors(tiny(tmp_path), lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp.experts" not in n})
    with pytest.raises(CheckpointError, match=r"all 16 experts of decoder layer 1 are missing"):
        open_checkpoint(tmp_path)


def test_half_of_a_pair_of_projections(tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> Tensors:
        return {n: t for n, t in tensors.items() if not (".layers.3." in n and ".up_proj." in n)}

    edit_tensors(tiny(tmp_path), drop)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.experts\.gate_up_proj: no tensor .* matches .*up_proj"):
        open_checkpoint(tmp_path)


def test_one_expert_too_many(tmp_path: Path) -> None:
    extra = "model.layers.0.mlp.experts.16.down_proj.weight"
    edit_tensors(tiny(tmp_path), lambda tensors: {**tensors, extra: torch.zeros(64, 32, dtype=torch.bfloat16)})
    with pytest.raises(CheckpointError, match=re.escape(f"{extra} is of expert 16 of 16")):
        open_checkpoint(tmp_path)


def test_one_expert_of_another_shape(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    edit_tensors(tiny(tmp_path), lambda tensors: {**tensors, name: tensors[name][:, :16]})
    with pytest.raises(CheckpointError, match=re.escape(name)):
        open_checkpoint(tmp_path)


def test_all_experts_of_another_shape(tmp_path: Path) -> None:
    """The config says 32, the tensors 16."""

    def halve(tensors: Tensors) -> Tensors:
        return {n: t[:, :16] if "down_proj" in n else t for n, t in tensors.items()}

    edit_tensors(tiny(tmp_path), halve)
    with pytest.raises(CheckpointError, match=r"gives \[16, 64, 16\], but down_proj of olmoe is \[16, 64, 32\]"):
        open_checkpoint(tmp_path)


def test_fused_tensors_for_fewer_experts(tmp_path: Path) -> None:
    def fewer(tensors: Tensors) -> Tensors:
        return {n: t[:5] if n.endswith("experts.down_proj") else t for n, t in tensors.items()}

    edit_tensors(tiny(tmp_path, "gpt_oss"), fewer)
    with pytest.raises(CheckpointError, match=r"down_proj \[5, .* is not for 8 experts"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float64])
def test_experts_in_other_dtypes_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.layers.2.mlp.experts.9.gate_proj.weight"
    edit_tensors(tiny(tmp_path), lambda tensors: {**tensors, name: tensors[name].to(dtype)})
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}' is (I8|U8|F8_E4M3|F64); supported: F32, F16, BF16"):
        open_checkpoint(tmp_path)


def test_dense_tensors_and_experts_are_all_there_is(tmp_path: Path) -> None:
    """Nothing is counted twice and nothing is lost."""
    checkpoint = open_checkpoint(tiny(tmp_path, "deepseek_v2"))
    assert checkpoint.sources is not None
    experts = {s.tensor for layer in checkpoint.sources.layers for e in range(layer.experts) for s in layer.segments(e)}
    assert experts.isdisjoint(checkpoint.dense)
    assert experts | checkpoint.dense.keys() == checkpoint.shards.tensors.keys()


def test_numbers_in_names() -> None:
    names = ["m.0.experts.1.w.2", "m.0.experts.0.w.2"]
    assert by_expert(names, 2, "p") == names[::-1]
    with pytest.raises(CheckpointError, match="two tensors for one expert"):
        by_expert(["a.1.w", "a.01.w"], 2, "p")
    with pytest.raises(CheckpointError, match="cannot tell the experts apart"):
        by_expert(["a.x.w", "a.y.w"], 2, "p")
    with pytest.raises(CheckpointError, match="cannot tell the experts apart"):
        by_expert(["a.0.w.0", "a.1.w.1"], 2, "p")
    with pytest.raises(CheckpointError, match=r"a\.10\.w and 2 more"):
        by_expert(["a.0.w", "a.1.w", "a.2.w"], 13, "p")
