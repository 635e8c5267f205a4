"""Layer shapes of published models, and how a checkpoint is grown to them."""

from __future__ import annotations

from dataclasses import dataclass

from foregate.checkpoint.opening import Checkpoint
from foregate.errors import ConfigError
from foregate.testing.inflate_sizes import FACTORS, Growth, Sizes, head_dim_of, sizes_of


@dataclass(frozen=True, slots=True)
class Published:
    """One layer of a published model; ``queries`` and ``keys`` are the rows of q_proj and of k_proj (and v_proj)."""

    hidden: int
    intermediate: int
    queries: int
    keys: int
    shared: int | None = None

    @property
    def expert_weights(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.hidden * self.intermediate


PRESETS = {
    "qwen1.5-moe-a2.7b": Published(2048, 1408, queries=2048, keys=2048, shared=5632),
    "qwen3-30b-a3b": Published(2048, 768, queries=4096, keys=512),
    "olmoe-1b-7b": Published(2048, 1024, queries=2048, keys=2048),
}


def growth_of(preset: str, checkpoint: Checkpoint) -> Growth:
    """What makes a layer of ``checkpoint`` as large as the published one: its experts, and its attention's weights.

    A shared expert is grown where the model has one. Layers, experts, k and vocabulary stay the model's own.
    Raises ConfigError for an unknown name, or naming the size that cannot be reached.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is none of {', '.join(PRESETS)}")
    published, own = PRESETS[preset], sizes_of(checkpoint)
    factor = published.hidden // own.hidden
    if factor * own.hidden != published.hidden or factor not in FACTORS:
        message = f"preset {preset}: hidden size {published.hidden} is not {', '.join(map(str, FACTORS))} times"
        raise ConfigError(f"{message} the model's {own.hidden}")
    heads, kv_heads = _heads(published, own, head_dim_of(checkpoint))
    return Growth(
        hidden_factor=factor,
        intermediate=published.intermediate,
        shared_intermediate=published.shared if own.shared else None,
        heads=heads,
        kv_heads=kv_heads,
    )


def _heads(published: Published, own: Sizes, head_dim: int) -> tuple[int, int]:
    """Heads and key/value heads whose projections have the published number of weights, to the nearest group.

    Queries that share a key/value head stay as many, or become a divisor: then the original's heads lie together, in
    front, and the output projection adds in the original's order.
    """
    shared, wanted = own.heads // own.kv_heads, published.queries // published.keys
    group = wanted if shared % wanted == 0 else shared
    kv_heads = max(1, round((published.queries + published.keys) / (head_dim * (group + 1))))
    return group * kv_heads, kv_heads
