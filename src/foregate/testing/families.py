"""Tiny configurations of every family that transformers dispatches through its experts interface. No torch.

E experts and k chosen vary on purpose (8/2, 16/4, 6/3); hidden 64, experts 32 to 48 wide, at least three MoE layers.
"""

from __future__ import annotations

from typing import Any

from foregate.testing.tokenizer import BOS, EOS, PAD, VOCAB_SIZE

Config = dict[str, Any]

COMMON: Config = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}

MLA: Config = {  # multi-head latent attention, as in DeepSeek
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}

GROUPED: Config = {  # sigmoid router with a correction bias and expert groups, after one dense layer
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
}

REQUIRED_CONFIGS: dict[str, Config] = {
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "qwen3_moe": {
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 48},
    "olmoe": {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 32, "num_hidden_layers": 4},
    "deepseek_v2": {
        **MLA,
        "first_k_dense_replace": 1,
        "n_routed_experts": 12,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
    },
    "deepseek_v3": {**MLA, **GROUPED},
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "head_dim": 16,
        "sliding_window": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "phimoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 40,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "granitemoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "intermediate_size": 32,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.25,
        "logits_scaling": 2.0,
    },
    "glm4_moe": {
        **GROUPED,
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "head_dim": 16,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "lfm2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 5,
        "num_dense_layers": 2,
        "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"],
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
    },
    "jamba": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 6,
        "intermediate_size": 32,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
    },
    "qwen3_next": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}
"""The families that the project promises."""

FURTHER_CONFIGS: dict[str, Config] = {}
"""Families that work as well."""

REFUSED_CONFIGS: dict[str, Config] = {
    "llama": {"intermediate_size": 96},
    "llama4_text": {
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "intermediate_size": 32,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 2,
        "head_dim": 16,
    },
}
"""Checkpoints that Foregate must refuse: dense ones, and MoE ones whose experts transformers does not dispatch."""

CONFIGS = {**REQUIRED_CONFIGS, **FURTHER_CONFIGS, **REFUSED_CONFIGS}
REQUIRED = tuple(REQUIRED_CONFIGS)
FAMILIES = (*REQUIRED_CONFIGS, *FURTHER_CONFIGS)
REFUSED = tuple(REFUSED_CONFIGS)


def config_of(family: str, **overrides: Any) -> Config:
    """Keyword arguments of the family's config class. Raises ValueError for an unknown family."""
    if family not in CONFIGS:
        raise ValueError(f"unknown family {family!r}; choose from: {', '.join(CONFIGS)}")
    return {**COMMON, **CONFIGS[family], **overrides}
