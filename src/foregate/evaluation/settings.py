"""What can be chosen about an evaluation; the command line reads its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from foregate.errors import ConfigError
from foregate.sim.device import Device
from foregate.sim.replay import SIM_POLICIES

CONTROLS = ("none", "oracle", "shuffled", "fresh-gate")
"""Always evaluated; they must read what they must."""

POLICY = "lfru"
"""Cache policy of the figures that name none: aged LFU, the best causal policy of most published workloads."""


@dataclass(frozen=True, slots=True)
class Settings:
    """``residencies`` are shares of all experts that the simulated cache holds. ``reads``: speculative reads for one
    layer of one token, the same for every method (None: k, what the widest layer chooses). ``tokens`` and
    ``sim_tokens`` bound the decode tokens that are scored and simulated, whole prompts, every domain in turn."""

    traces: tuple[Path, ...]
    model: str | None = None
    residencies: tuple[float, ...] = (0.10, 0.25, 0.50)
    policies: tuple[str, ...] = ("lru", "lfru", "echo", "belady")
    lookahead: int | None = None
    reads: int | None = None
    far_share: float = 0.5
    tokens: int | None = 10_000
    sim_tokens: int = 800
    device: Device = field(default_factory=Device)
    bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for share in self.residencies:
            if not 0 < share < 1:
                raise ConfigError(f"budget {share:.3g} of all experts must be above 0 % and below 100 %")
        for policy in self.policies:
            if policy not in SIM_POLICIES:
                raise ConfigError(f"unknown cache policy {policy!r}; choose from: {', '.join(SIM_POLICIES)}")
        if not self.residencies or not self.policies:
            raise ConfigError("an evaluation needs at least one budget and one cache policy")
        if self.reads is not None and self.reads < 1:
            raise ConfigError(f"reads {self.reads} must be at least 1")
        if not 0 <= self.far_share <= 1:
            raise ConfigError(f"far share {self.far_share} must be from 0 to 1")
        for name in ("tokens", "sim_tokens", "bootstrap"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name.replace('_', ' ')} {value} must be at least 1")
        if self.lookahead is not None and self.lookahead < 0:
            raise ConfigError(f"lookahead {self.lookahead} must not be negative")


def percent(share: float) -> str:
    """``0.25`` → ``25%``, the key of a budget in results."""
    return f"{100 * share:g}%"


def parse_budgets(text: str) -> tuple[float, ...]:
    """``10%,25%,50%`` → shares. Raises ConfigError for what is not a percentage."""
    shares = []
    for item in text.split(","):
        number = item.strip().removesuffix("%")
        try:
            share = float(number) / 100
        except ValueError:
            raise ConfigError(f"budget {item.strip()!r} is not a percentage of all experts, such as 25%") from None
        if not item.strip().endswith("%"):
            raise ConfigError(f"budget {item.strip()!r}: a simulated cache is given as a share, such as 25%")
        shares.append(share)
    return tuple(dict.fromkeys(shares))
