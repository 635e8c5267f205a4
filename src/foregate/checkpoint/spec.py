"""What a model is, in numbers: from its config and headers alone, the same for an original checkpoint and for its pack.

Shapes: E experts of a layer, k chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from foregate.checkpoint.dtypes import spelling
from foregate.checkpoint.skeleton import Skeleton
from foregate.errors import CheckpointError, UnsupportedModelError
from foregate.types import ExpertKey, ExpertLayout

TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "num_selected_experts",
    "num_activated_experts",
)
SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
SHARED_WIDTH_KEYS = ("shared_expert_intermediate_size", "shared_intermediate_size", "shared_experts_intermediate_size")
CONTEXT_KEYS = ("max_position_embeddings", "model_max_length", "max_seq_len", "n_positions")


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A Mixture-of-Experts model in numbers. Sizes are bytes as loaded; only ``expert_slot_bytes`` includes padding.

    ``moe_layers`` are decoder layer indices and ``module_paths`` their experts modules, both in execution order.
    ``shared_experts`` and ``context_length`` are None where the config does not say.
    """

    model_type: str
    architecture: str
    dtype: str
    decoder_layers: int
    moe_layers: tuple[int, ...]
    module_paths: tuple[str, ...]
    experts_per_layer: tuple[int, ...]
    top_k: int
    shared_experts: int | None
    hidden_size: int
    vocab_size: int
    context_length: int | None
    expert_bytes: int
    expert_slot_bytes: int
    total_expert_bytes: int
    dense_bytes: int

    @property
    def layers(self) -> int:
        """MoE layers."""
        return len(self.module_paths)

    @property
    def experts(self) -> int:
        """Routed experts of the whole model."""
        return sum(self.experts_per_layer)

    @property
    def total_bytes(self) -> int:
        return self.dense_bytes + self.total_expert_bytes

    @property
    def bytes_per_token(self) -> int:
        """Weights that one decoded token touches: everything dense, and k experts of every MoE layer."""
        return self.dense_bytes + self.top_k * self.layers * self.expert_bytes

    @property
    def layer_budget(self) -> int:
        """Bytes of k slots: a smaller budget cannot hold what one layer needs for one token at the same time."""
        return self.top_k * self.expert_slot_bytes


def make_spec(skeleton: Skeleton, layout_of: Callable[[ExpertKey], ExpertLayout]) -> MoeSpec:
    """The spec of a model whose experts have the layouts that ``layout_of`` tells."""
    config = skeleton.config.get_text_config()
    counts = tuple(module.experts for module in skeleton.moe)
    layouts = [layout_of(ExpertKey(layer, e)) for layer, count in enumerate(counts) for e in range(count)]
    return MoeSpec(
        model_type=config.model_type,
        architecture=type(skeleton.model).__name__,
        dtype=spelling(skeleton.dtype),
        decoder_layers=int(config.num_hidden_layers),
        moe_layers=tuple(module.layer for module in skeleton.moe),
        module_paths=tuple(module.path for module in skeleton.moe),
        experts_per_layer=counts,
        top_k=_top_k(config, min(counts)),
        shared_experts=_shared(config),
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        context_length=_context(config),
        expert_bytes=max(layout.weight_bytes for layout in layouts),
        expert_slot_bytes=max(layout.nbytes for layout in layouts),
        total_expert_bytes=sum(layout.weight_bytes for layout in layouts),
        dense_bytes=skeleton.dense_bytes,
    )


def _top_k(config: Any, experts: int) -> int:
    top_k = _first(config, TOP_K_KEYS)
    if top_k is None or not 0 < top_k <= experts:
        message = f"model type {config.model_type!r}: the experts per token are {top_k}, of {experts} experts"
        raise UnsupportedModelError(f"{message} (looked at {', '.join(TOP_K_KEYS)})")
    return top_k


def _context(config: Any) -> int | None:
    length = _first(config, CONTEXT_KEYS)
    if length is not None and length <= 0:
        raise CheckpointError(f"model type {config.model_type!r}: config.json says a context of {length} positions")
    return length


def _shared(config: Any) -> int | None:
    count = _first(config, SHARED_KEYS)
    if count is not None:
        return count
    return 1 if _first(config, SHARED_WIDTH_KEYS) else None


def _first(config: Any, keys: Iterable[str]) -> int | None:
    """The first of ``keys`` that the config has; of a list with one value a layer, the largest."""
    for key in keys:
        value = getattr(config, key, None)
        if isinstance(value, (list, tuple)) and value:
            value = max(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
