"""How large an inflated model becomes: what is asked for, checked against what the checkpoint is. Writes nothing.

Shapes: D hidden, F expert hidden, H query heads, G key/value heads, d head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foregate.checkpoint.opening import Checkpoint
from foregate.errors import ConfigError, UnsupportedModelError

FAMILIES = ("qwen2_moe", "qwen3_moe")
"""Families whose every tensor has a rule. Others norm whole projections, or keep other weights in the experts."""

FACTORS = (1, 2, 4, 8, 16, 32)
"""D'/D. The square sum of the residual, over D', must be the original mean over a power of four."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a model; ``shared`` and ``dense`` are widths of shared experts and dense layers, 0 without any."""

    hidden: int
    expert: int
    shared: int
    dense: int
    heads: int
    kv_heads: int


@dataclass(frozen=True, slots=True)
class Growth:
    """What is asked for. None keeps a size; ``intermediate`` is the expert width F'."""

    hidden_factor: int = 4
    intermediate: int | None = None
    shared_intermediate: int | None = None
    dense_intermediate: int | None = None
    heads: int | None = None
    kv_heads: int | None = None


@dataclass(frozen=True, slots=True)
class Inflation:
    """A growth that fits a checkpoint of ``family`` with the norm epsilon ``eps``."""

    family: str
    before: Sizes
    after: Sizes
    head_dim: int
    eps: float
    tied: bool

    @property
    def factor(self) -> int:
        """D'/D."""
        return self.after.hidden // self.before.hidden

    @property
    def copies(self) -> int:
        """Times that the residual lies in D': two where D'/D is no power of four, so that half of it is one."""
        return 1 if self.factor.bit_length() % 2 else 2

    @property
    def shift(self) -> int:
        """log2 of what the norms' 1/rms is too large by: mean square and epsilon are divided by its square."""
        return (self.factor // self.copies).bit_length() // 2

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normed, with the same epsilon as the residual."""
        return self.family == "qwen3_moe"

    @property
    def expert_weights(self) -> int:
        """Weights of one routed expert, 3 D' F'."""
        return 3 * self.after.hidden * self.after.expert

    def config(self) -> dict[str, Any]:
        """The keys of config.json that change."""
        after = self.after
        changes: dict[str, Any] = {
            "hidden_size": after.hidden,
            "rms_norm_eps": self.eps / 4**self.shift,
            "moe_intermediate_size": after.expert,
            "num_attention_heads": after.heads,
            "num_key_value_heads": after.kv_heads,
            "head_dim": self.head_dim,
        }
        if after.shared:
            changes["shared_expert_intermediate_size"] = after.shared
        if after.dense:
            changes["intermediate_size"] = after.dense
        return changes


def sizes_of(checkpoint: Checkpoint) -> Sizes:
    """The sizes of ``checkpoint``. Raises UnsupportedModelError naming a family that has no rules, or a pack."""
    config: Any = checkpoint.skeleton.config
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedModelError(f"model type {config.model_type!r} cannot be inflated; supported: {known}")
    if checkpoint.packed:
        raise UnsupportedModelError(f"{checkpoint.directory} is a pack; inflate the original, then pack the result")
    has_dense = any(name.endswith(".mlp.gate_proj.weight") for name in checkpoint.dense)
    return Sizes(
        hidden=config.hidden_size,
        expert=config.moe_intermediate_size,
        shared=config.shared_expert_intermediate_size if config.model_type == "qwen2_moe" else 0,
        dense=config.intermediate_size if has_dense else 0,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
    )


def head_dim_of(checkpoint: Checkpoint) -> int:
    """d; configs that do not say mean D/H."""
    config: Any = checkpoint.skeleton.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def fit(checkpoint: Checkpoint, growth: Growth) -> Inflation:
    """The inflation of ``checkpoint`` by ``growth``.

    Raises ConfigError, with the value, for a size that cannot be; UnsupportedModelError as ``sizes_of``.
    """
    before = sizes_of(checkpoint)
    config: Any = checkpoint.skeleton.config
    if growth.hidden_factor not in FACTORS:
        raise ConfigError(f"hidden factor {growth.hidden_factor!r} is none of {', '.join(map(str, FACTORS))}")
    after = Sizes(
        hidden=before.hidden * growth.hidden_factor,
        expert=_grown("expert width", before.expert, growth.intermediate),
        shared=_grown("shared expert width", before.shared, growth.shared_intermediate),
        dense=_grown("dense width", before.dense, growth.dense_intermediate),
        heads=_grown("attention heads", before.heads, growth.heads),
        kv_heads=_grown("key/value heads", before.kv_heads, growth.kv_heads),
    )
    if after == before:
        raise ConfigError("nothing to inflate: every size is the model's own")
    _check_heads(before, after)
    tied = bool(config.tie_word_embeddings)
    return Inflation(config.model_type, before, after, head_dim_of(checkpoint), config.rms_norm_eps, tied)


def _grown(what: str, own: int, wanted: int | None) -> int:
    if wanted is None:
        return own
    if own == 0:
        raise ConfigError(f"{what} {wanted!r}: the model has none")
    if wanted < own:
        raise ConfigError(f"{what} {wanted!r} is below the model's own {own}")
    return wanted


def _check_heads(before: Sizes, after: Sizes) -> None:
    if after.heads % after.kv_heads:
        raise ConfigError(f"{after.heads} attention heads are not a multiple of {after.kv_heads} key/value heads")
    needed = before.kv_heads * kv_copies(before, after)
    if needed > after.kv_heads:
        shared = after.heads // after.kv_heads
        message = f"{after.heads} attention heads over {after.kv_heads} key/value heads ({shared} on each)"
        raise ConfigError(f"{message} cannot hold the model's {before.heads} over {before.kv_heads}")


def kv_copies(before: Sizes, after: Sizes) -> int:
    """Key/value heads that stand for one of the original's: more than one where fewer queries share each."""
    return -(-(before.heads // before.kv_heads) // (after.heads // after.kv_heads))
