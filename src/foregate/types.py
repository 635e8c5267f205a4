"""Vocabulary that everyone imports and that imports no one: keys, layouts, routing, predictions, steps. No torch.

Shapes: T tokens, k experts chosen per token, E experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 4096
"""Bytes. O_DIRECT wants file offset, length and memory address aligned to the logical block; 4 KiB suits every disk."""


def align_up(nbytes: int, to: int = ALIGNMENT) -> int:
    """Smallest multiple of ``to`` that is not below ``nbytes``."""
    return -(-nbytes // to) * to


class ExpertKey(NamedTuple):
    """One routed expert. ``layer`` counts MoE layers only (0 … L-1 in execution order), not decoder layers."""

    layer: int
    expert: int


class Phase(str, Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class Moment(str, Enum):
    """When, within MoE layer l of a decode step, a predictor is asked. Later moments know more."""

    BEFORE_ATTENTION = "before-attention"
    """The input of attention is known: the window is attention and norm of layer l itself."""
    AFTER_ATTENTION = "after-attention"
    """The residual stream after attention and the router's input are known, the choice is not."""
    AFTER_ROUTING = "after-routing"
    """The choice is known, and its missing experts are being read; the experts have not run."""


@dataclass(frozen=True, slots=True)
class ParamLayout:
    """One parameter of one expert inside a slot: ``offset``/``nbytes`` in bytes, ``dtype`` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """How one expert lies in memory. Parameters start at multiples of 64 bytes; ``nbytes`` is a multiple of 4096."""

    params: tuple[ParamLayout, ...]
    nbytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights alone, padding left out."""
        return sum(param.nbytes for param in self.params)


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous byte range of a safetensors file that holds one tensor, or one expert's slice of a fused tensor."""

    path: str
    tensor: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RoutingStep:
    """What the router of one MoE layer chose for one forward pass.

    ``experts`` and ``weights`` are [T, k] in rank order; ``position`` is the sequence position of the first token.
    """

    layer: int
    phase: Phase
    position: int
    experts: NDArray[np.int64]
    weights: NDArray[np.float32]


class Prediction(NamedTuple):
    """Experts that ``layer`` may need, most likely first. A hint for transfers, never for the routing.

    Of L MoE layers, ``layer`` L + m is layer m of the *next* token.
    """

    layer: int
    experts: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PredictorCost:
    """What asking a predictor once takes: floating-point operations, bytes of weights read; its parameters in all."""

    flops: int = 0
    nbytes: int = 0
    parameters: int = 0


@dataclass(slots=True)
class StepStats:
    """Counters and seconds of one forward pass (or, summed, of a whole run). Bytes are bytes read from the store.

    Seconds are of the thread that generates, but for ``product_s``, in which any thread computed products, and
    ``compute_s``, in which any computed experts; ``predict_s`` may lie in both. ``beside_s``: no product was computed
    and no read waited for, but one that was to be waited for was under way.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    issued: int = 0
    used: int = 0
    late: int = 0
    wasted: int = 0
    cancelled: int = 0
    retries: int = 0
    stall_s: float = 0.0
    demand_stall_s: float = 0.0
    late_stall_s: float = 0.0
    io_s: float = 0.0
    compute_s: float = 0.0
    product_s: float = 0.0
    beside_s: float = 0.0
    predict_s: float = 0.0
    wall_s: float = 0.0

    def add(self, other: StepStats) -> None:
        """Add every field of ``other`` to this one."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class FinishReason(str, Enum):
    LENGTH = "length"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class GenerationStep:
    """One generated token. ``text`` is what this token added to the output (may be empty inside a character)."""

    index: int
    token_id: int
    text: str
    phase: Phase
    stats: StepStats = field(default_factory=StepStats)
    finish: FinishReason | None = None
