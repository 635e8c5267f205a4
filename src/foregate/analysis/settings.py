"""What can be chosen about an analysis; every limit that bounds its memory is here."""

from __future__ import annotations

from dataclasses import dataclass

from foregate.errors import ConfigError

PHASES = ("all", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class Settings:
    """Frozen settings of one analysis; the command line reads its defaults from here. Sizes are bytes."""

    seed: int = 0
    permutations: int = 2000
    phase: str = "all"
    max_hop: int | None = None
    test_share: float = 0.2
    count_bytes: int = 3 << 30
    """Bound of the pair counts (train and test together); a model that needs more must give ``max_hop``."""
    eval_tokens: int = 30_000
    """Test tokens scored, spread evenly over test prompts and within each."""
    prompt_tokens: int = 2_048
    """Tokens of one prompt scored at most."""
    replay_events: int = 25_000
    """Events replayed through the caches at most; whole prompts, chosen by hash."""
    residencies: tuple[float, ...] = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
    miss_residencies: tuple[float, ...] = (0.25, 0.5)
    """Residencies of the LRU cache whose misses recall is also taken over."""
    sketch: int = 65_536
    """Paths held by each sketch; counts are exact while there are no more distinct paths."""
    domain_prompts: int = 512
    """Prompts of a domain in the significance tests at most, chosen by hash."""
    domains: int = 6
    """Domains compared pairwise: the largest ones."""

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ConfigError(f"phase {self.phase!r} is not one of {', '.join(PHASES)}")
        if self.permutations < 1:
            raise ConfigError(f"permutations {self.permutations} must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} must not be negative")
        if self.max_hop is not None and self.max_hop < 1:
            raise ConfigError(f"max hop {self.max_hop} must be at least 1")
