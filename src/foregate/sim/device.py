"""The machine that is simulated: one link that experts come over, and how long a layer computes."""

from __future__ import annotations

from dataclasses import dataclass

from foregate.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Device:
    """Bytes, bytes per second, seconds. Of a layer, ``attention_s`` passes before its routing is known and
    ``experts_s`` after it. ``chunk_bytes``: a demand read overtakes a speculative one at the next chunk.

    The defaults are an expert of Qwen3-30B-A3B (9.4 MB in bf16) on a 3 GB/s drive, under a layer that computes for as
    long as two experts take to read. Raises ConfigError for what is not a positive number.
    """

    bandwidth: float = 3.0e9
    expert_bytes: int = 9_437_184
    attention_s: float = 2.0e-3
    experts_s: float = 4.3e-3
    chunk_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("bandwidth", "expert_bytes", "chunk_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"device: {name} {getattr(self, name)!r} must be positive")
        for name in ("attention_s", "experts_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"device: {name} {getattr(self, name)!r} must not be negative")

    @property
    def read_s(self) -> float:
        """Seconds that one expert takes on an idle link."""
        return self.expert_bytes / self.bandwidth

    @property
    def chunk_s(self) -> float:
        """Seconds of one chunk."""
        return min(self.chunk_bytes, self.expert_bytes) / self.bandwidth

    @property
    def layer_s(self) -> float:
        """Seconds that a layer computes: C of one layer."""
        return self.attention_s + self.experts_s
