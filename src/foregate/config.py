"""Frozen settings; the CLI reads its defaults and choices from here. Also the grammar of ``--memory-budget``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from foregate.errors import BudgetError, ConfigError

UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip

_MOST = 2**60

DEFAULT_READERS = 4
"""Reader threads where nothing was measured."""

MOST_READERS = 64

LEAST_PREFILL_CHUNK = 16

DEFAULT_PREFILL_CHUNK = 512
"""Tokens of a prompt that go through the model at once. A constant, never the budget's: it is part of the result."""

LOSSY_MODES = ("execute-predicted", "skip-late", "low-precision-miss")
"""Ways to run that change outputs, in exchange for reads; see docs/lossy.md. Never a default."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A parsed ``--memory-budget``: exactly one of bytes, a share of all expert bytes (0 < share), or automatic."""

    nbytes: int | None = None
    share: float | None = None

    @property
    def automatic(self) -> bool:
        return self.nbytes is None and self.share is None


def parse_budget(text: str) -> Budget:
    """``8GB``, ``8GiB``, ``512M``, ``1000000``, ``25%`` or ``auto``. Raises BudgetError with the value otherwise."""
    value = str(text).strip()
    if value.lower() == "auto":
        return Budget()
    match = re.fullmatch(r"([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?|[-+]?nan|[-+]?inf(?:inity)?)\s*(%|[A-Za-z]*)", value, re.I)
    number = _number(match.group(1)) if match else None
    if match is None or number is None:
        raise BudgetError(f"memory budget {text!r} is not a size: use bytes (8GB, 512MiB), a share (25%) or auto")
    if not math.isfinite(number) or number <= 0:
        raise BudgetError(f"memory budget {text!r} must be a positive, finite amount")
    unit = match.group(2).upper()
    if unit == "%":
        return Budget(share=number / 100)
    if unit not in UNITS:
        raise BudgetError(
            f"memory budget {text!r}: unknown unit {match.group(2)!r}; use KB, MB, GB, KiB, MiB, GiB or %"
        )
    if number * UNITS[unit] > _MOST:
        raise BudgetError(f"memory budget {text!r} is more than any machine has")
    return Budget(nbytes=int(number * UNITS[unit]))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_prefetch(text: str) -> int | None:
    """``auto`` → None, ``off`` → 0, ``N`` → at most N speculative reads a layer. Raises ConfigError otherwise."""
    value = str(text).strip().lower()
    if value == "auto":
        return None
    if value == "off":
        return 0
    if re.fullmatch(r"[0-9]{1,6}", value):
        return int(value)
    raise ConfigError(f"prefetch {text!r} is not auto, off or a whole number of experts per layer")


def parse_readers(text: str | int) -> int | None:
    """``auto`` → None (measured at the start), else a number of reader threads (0: none). Raises ConfigError."""
    value = str(text).strip().lower()
    if value == "auto":
        return None
    if re.fullmatch(r"[0-9]{1,3}", value) and int(value) <= MOST_READERS:
        return int(value)
    raise ConfigError(f"reader threads {text!r} is not auto or a number from 0 to {MOST_READERS}")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """How to run a model. ``threads`` are compute threads (None: torch's own choice); the readers come on top.

    ``predictor`` is a name or a predictor file; ``lookahead`` None is what it was made for.
    ``reader_threads``: a number, or "auto" to measure what the disk of a pack needs. 0 reads each expert when it is
    waited for, on the compute thread: a naive offloader, for comparison; nothing is read ahead then.
    ``prefill_chunk``: tokens of a prompt that are computed at once; another number may change the last bits of logits.
    ``lossy``: one of LOSSY_MODES, which change outputs; ``low_precision_pack`` is where low-precision-miss reads.
    """

    model: str = "reference"
    memory_budget: str = "25%"
    predictor: str = "next-gate"
    prefetch: str = "auto"
    lookahead: int | None = None
    cache_policy: str = "echo"
    reader_threads: str | int = "auto"
    threads: int | None = None
    read_timeout_s: float = 120.0
    lossy: str | None = None
    low_precision_pack: str | None = None
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK

    def __post_init__(self) -> None:
        parse_budget(self.memory_budget)
        parse_prefetch(self.prefetch)
        if self.lookahead is not None:
            _at_least("lookahead", self.lookahead, 0)
        if self.predictor == "none" and (parse_prefetch(self.prefetch) or self.lookahead is not None):
            raise ConfigError(
                f"predictor none predicts nothing: prefetch {self.prefetch} and lookahead {self.lookahead} have no use"
            )
        if self.lookahead is not None and parse_prefetch(self.prefetch) == 0:
            raise ConfigError(f"prefetch off reads nothing ahead: lookahead {self.lookahead} has no use")
        readers = parse_readers(self.reader_threads)
        if readers == 0 and (self.predictor != "none" or parse_prefetch(self.prefetch) != 0):
            raise ConfigError("reader threads 0 read nothing ahead: give predictor none and prefetch off with it")
        if self.threads is not None:
            _at_least("threads", self.threads, 1)
        _at_least("prefill chunk", self.prefill_chunk, LEAST_PREFILL_CHUNK)
        if not self.read_timeout_s > 0:
            raise ConfigError(f"read time-out {self.read_timeout_s!r} must be a positive number of seconds")
        if self.lossy is not None or self.low_precision_pack is not None:
            self._check_lossy()

    def _check_lossy(self) -> None:
        """Raises ConfigError for an unknown mode, and for settings that leave it nothing to do."""
        if self.lossy is not None and self.lossy not in LOSSY_MODES:
            raise ConfigError(f"unknown lossy mode {self.lossy!r}; choose from: {', '.join(LOSSY_MODES)}")
        low = self.lossy == "low-precision-miss"
        if low != (self.low_precision_pack is not None):
            given = (
                f"low-precision pack {self.low_precision_pack}" if self.low_precision_pack else f"lossy {self.lossy}"
            )
            raise ConfigError(f"{given}: give --lossy low-precision-miss and --low-precision-pack together")
        if parse_readers(self.reader_threads) == 0:
            raise ConfigError(
                f"lossy {self.lossy} has no use with reader threads 0, which read only what is waited for"
            )
        if self.lossy == "execute-predicted" and (self.predictor == "none" or parse_prefetch(self.prefetch) == 0):
            raise ConfigError(
                f"lossy execute-predicted runs what was predicted and read ahead: predictor {self.predictor} "
                f"and prefetch {self.prefetch} leave it nothing"
            )


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How to choose tokens. ``temperature`` 0 is greedy; then ``top_p`` and ``seed`` have nothing to act on."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("max new tokens", self.max_new_tokens, 1)
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 1e3:
            raise ConfigError(f"temperature {self.temperature!r} must be 0 (greedy) or from 0.001 to 1000")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p {self.top_p!r} must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed!r} must be from 0 to 2^63 - 1")
        if self.temperature == 0 and self.top_p != 1.0:
            raise ConfigError(f"top-p {self.top_p} does nothing at temperature 0 (greedy); give --temperature too")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} {value!r} must be at least {least}")
