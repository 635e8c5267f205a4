"""Settings of vLLM under which a trace would have gaps or be of something else: refused, each with its remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from foregate.errors import TraceError
from foregate.trace.vllm.versions import reach

GAPS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "cache_config.enable_prefix_caching",
        bool,
        "tokens of a cached prefix are not routed again, so the trace would have gaps; --no-enable-prefix-caching",
    ),
    (
        "model_config.enforce_eager",
        lambda eager: not eager,
        "compiled graphs do not call what records; --enforce-eager",
    ),
    ("use_v2_model_runner", bool, "model runner V2 keeps its batches elsewhere; VLLM_USE_V2_MODEL_RUNNER=0"),
    ("speculative_config", bool, "drafted tokens that are rejected would be in the trace; no speculative decoding"),
    ("kv_transfer_config", bool, "tokens whose keys and values come from elsewhere are not routed; no KV transfer"),
    ("lora_config", bool, "an adapter is another model than the one the trace names; no LoRA"),
    ("model_config.enable_prompt_embeds", bool, "prompts without token ids; no --enable-prompt-embeds"),
    ("load_config.load_format", lambda kind: str(kind) == "dummy", "dummy weights are not the model's"),
    ("parallel_config.pipeline_parallel_size", lambda size: size > 1, "no worker sees all layers; pipeline size 1"),
    ("parallel_config.data_parallel_size", lambda size: size > 1, "no worker sees all requests; data parallel size 1"),
    ("parallel_config.prefill_context_parallel_size", lambda size: size > 1, "no worker sees all tokens; size 1"),
    ("parallel_config.use_sequence_parallel_moe", bool, "no worker sees all tokens; no sequence-parallel MoE"),
    ("parallel_config.enable_dbo", bool, "a pass is cut in two; no dual batch overlap"),
)
"""Path in VllmConfig, whether its value is refused, and why."""


def check_config(config: Any) -> None:
    """Raises TraceError for the first setting of a ``VllmConfig`` that cannot be traced."""
    for path, refused, why in GAPS:
        value = reach(config, path)
        if refused(value):
            shown = value if isinstance(value, (bool, int, str)) else type(value).__name__
            raise TraceError(f"vLLM cannot be traced with {path} = {shown}: {why}")
