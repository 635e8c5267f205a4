"""The settings in the GGUF file of a Qwen3-MoE, and what such a file cannot say and is refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter

from foregate.bench.rivals.gguf_tokenizer import write_tokenizer
from foregate.errors import CheckpointError, UnsupportedModelError

FAMILY = gguf.MODEL_ARCH.QWEN3MOE
ARCHITECTURE = gguf.MODEL_ARCH_NAMES[FAMILY]

FIXED: dict[str, tuple[Any, Any]] = {
    "decoder_sparse_step": (1, 1),
    "mlp_only_layers": ([], []),
    "norm_topk_prob": (True, False),
    "attention_bias": (False, False),
    "use_sliding_window": (False, False),
    "hidden_act": ("silu", "silu"),
}
"""What llama.cpp's Qwen3-MoE has built in: setting → its value there, and transformers' default."""


def write_settings(writer: GGUFWriter, model_dir: Path, raw: dict[str, Any], *, tokenizer: bool) -> None:
    """Put the settings of ``raw`` (config.json) into ``writer``. Raises UnsupportedModelError, CheckpointError."""
    check(model_dir, raw)
    try:
        _sizes(writer, raw)
    except KeyError as error:
        raise CheckpointError(f"{model_dir / 'config.json'}: {error.args[0]} is missing") from None
    writer.add_name(model_dir.resolve().name)
    write_tokenizer(writer, model_dir, raw, known=tokenizer)


def check(model_dir: Path, raw: dict[str, Any]) -> None:
    """Raises UnsupportedModelError for a model that a GGUF file of a Qwen3-MoE cannot express."""
    family = raw["model_type"]
    if family != "qwen3_moe":
        raise UnsupportedModelError(f"{model_dir}: model type {family!r}; the GGUF exporter knows qwen3_moe only")
    for name, (fixed, default) in FIXED.items():
        value = raw.get(name, default)
        if (value or []) != (fixed or []):
            raise UnsupportedModelError(
                f"{model_dir}: {name} is {value!r}; llama.cpp's Qwen3-MoE has {fixed!r} built in"
            )
    rope = _rope(raw)
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedModelError(
            f"{model_dir}: rope_type {rope['rope_type']!r}; the GGUF exporter knows 'default' only"
        )


def experts_of(raw: dict[str, Any]) -> int:
    """Experts a layer; transformers has written both names. Raises KeyError with the newer one."""
    return int(raw["num_experts"] if "num_experts" in raw else raw["num_local_experts"])


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes rope_parameters, before it was rope_scaling and rope_theta."""
    return {
        "rope_theta": raw.get("rope_theta", 10000.0),
        **(raw.get("rope_scaling") or {}),
        **(raw.get("rope_parameters") or {}),
    }


def _sizes(writer: GGUFWriter, raw: dict[str, Any]) -> None:
    heads = raw["num_attention_heads"]
    # stated, because hidden / heads is wrong for most Qwen3 and for every inflated model
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(_rope(raw)["rope_theta"]))
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_expert_count(experts_of(raw))
    writer.add_expert_used_count(raw["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(raw["moe_intermediate_size"])
