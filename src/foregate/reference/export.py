"""Between the training twin's parameters and a transformers checkpoint (Qwen3-MoE, one tensor per expert matrix).

Shapes: D hidden, F expert hidden, E experts; matrices are [out, in] on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, Qwen3MoeConfig

from foregate.errors import CheckpointError
from foregate.reference.files import atomic_write, write_json
from foregate.reference.model import ModelConfig
from foregate.reference.tokenizer import END_ID, PAD_ID, save_tokenizer

ATTENTION = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "output": "self_attn.o_proj"}
NORMS = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}


def to_transformers_config(config: ModelConfig) -> Qwen3MoeConfig:
    """The config.json of the exported model."""
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.expert_hidden * config.experts_per_token,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,  # type: ignore[call-arg]
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=config.expert_hidden,
        num_experts=config.experts,
        num_experts_per_tok=config.experts_per_token,
        norm_topk_prob=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        dtype="bfloat16",
    )


def read_model_config(folder: Path) -> ModelConfig:
    """The ModelConfig of an exported model. Raises CheckpointError where config.json is not one of ours."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            layers=raw["num_hidden_layers"],
            experts=raw.get("num_experts") or raw["num_local_experts"],
            experts_per_token=raw["num_experts_per_tok"],
            expert_hidden=raw["moe_intermediate_size"],
            heads=raw["num_attention_heads"],
            kv_heads=raw["num_key_value_heads"],
            head_dim=raw["head_dim"],
            rope_theta=raw["rope_parameters"]["rope_theta"],
            norm_eps=raw["rms_norm_eps"],
            max_positions=raw["max_position_embeddings"],
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: no exported reference model there ({error})") from error


def to_checkpoint(config: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Training parameters as contiguous bf16 tensors under transformers' names."""
    tensors = dict(_checkpoint_views(config, named))
    return {name: tensor.detach().to(torch.bfloat16).contiguous().clone() for name, tensor in tensors.items()}


def from_checkpoint(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_checkpoint`, in the type of `tensors`."""
    named = {"embedding": tensors["model.embed_tokens.weight"], "final_norm": tensors["model.norm.weight"]}
    for index in range(config.layers):
        base, own = f"model.layers.{index}", f"layers.{index}"
        for ours, theirs in (ATTENTION | NORMS).items():
            named[f"{own}.{ours}"] = tensors[f"{base}.{theirs}.weight"]
        named[f"{own}.qkv"] = torch.cat([tensors[f"{base}.self_attn.{part}_proj.weight"] for part in "qkv"])
        named[f"{own}.router"] = tensors[f"{base}.mlp.gate.weight"]
        each = [f"{base}.mlp.experts.{expert}" for expert in range(config.experts)]
        named[f"{own}.gate_up"] = torch.stack(
            [torch.cat((tensors[f"{name}.gate_proj.weight"], tensors[f"{name}.up_proj.weight"])) for name in each]
        )
        named[f"{own}.down"] = torch.stack([tensors[f"{name}.down_proj.weight"] for name in each])
    return named


def _checkpoint_views(config: ModelConfig, named: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield "model.embed_tokens.weight", named["embedding"]
    yield "model.norm.weight", named["final_norm"]
    sizes = [config.heads * config.head_dim, *[config.kv_heads * config.head_dim] * 2]
    for index in range(config.layers):
        base, own = f"model.layers.{index}", f"layers.{index}"
        for ours, theirs in (ATTENTION | NORMS).items():
            yield f"{base}.{theirs}.weight", named[f"{own}.{ours}"]
        for part, tensor in zip("qkv", torch.split(named[f"{own}.qkv"], sizes), strict=True):
            yield f"{base}.self_attn.{part}_proj.weight", tensor
        yield f"{base}.mlp.gate.weight", named[f"{own}.router"]
        for expert in range(config.experts):
            gate, up = named[f"{own}.gate_up"][expert].chunk(2)
            name = f"{base}.mlp.experts.{expert}"
            yield f"{name}.gate_proj.weight", gate
            yield f"{name}.up_proj.weight", up
            yield f"{name}.down_proj.weight", named[f"{own}.down"][expert]


def export(config: ModelConfig, named: Mapping[str, Tensor], tokenizer: Tokenizer, folder: Path) -> None:
    """Write a directory that AutoModelForCausalLM and AutoTokenizer load. Files are replaced one by one, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    to_transformers_config(config).save_pretrained(folder)
    _add_published_keys(config, folder / "config.json")
    ends = {"bos_token_id": END_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
    GenerationConfig(**ends).save_pretrained(folder)
    save_tokenizer(tokenizer, folder, config.max_positions)
    tensors = to_checkpoint(config, named)
    atomic_write(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def _add_published_keys(config: ModelConfig, path: Path) -> None:
    """Also name the two settings as published Qwen3-MoE configs do: readers other than transformers 5 look there."""
    written = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, written | {"num_experts": config.experts, "rope_theta": config.rope_theta})


def read_exported(folder: Path) -> dict[str, Tensor]:
    """Training parameters (bf16) of an exported model. Raises CheckpointError where it is absent or incomplete."""
    path = folder / "model.safetensors"
    try:
        return from_checkpoint(read_model_config(folder), load_file(path))
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
