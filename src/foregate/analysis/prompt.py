"""One traced prompt as the collectors see it. Shapes: T tokens, L MoE layers, k width of the choice, E experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the traced model: ``experts_per_layer`` and ``top_k`` have one entry a MoE layer."""

    experts_per_layer: tuple[int, ...]
    top_k: tuple[int, ...]

    @property
    def layers(self) -> int:
        """L."""
        return len(self.top_k)

    @property
    def experts(self) -> int:
        """E of the widest layer."""
        return max(self.experts_per_layer)

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return sum(self.experts_per_layer)


@dataclass(frozen=True, slots=True)
class Prompt:
    """``experts`` [T, L, k] int32, largest router weight first, -1 where a layer chooses fewer; [T] for the others.

    ``index`` counts the prompts of an analysis; ``test`` prompts are never counted before they are scored.
    ``scores`` [T, L, E] of replayed prompts are the router's, None where the trace has none.
    ``timings`` are nanoseconds [T, L], of a pass in the row of its first token, -1 elsewhere.
    """

    index: int
    domain: str
    test: bool
    replayed: bool
    compared: bool
    experts: NDArray[np.int32]
    decode: NDArray[np.bool_]
    passes: NDArray[np.int32]
    timings: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    scores: NDArray[np.float16] | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.decode)


def multi_hot(experts: NDArray[np.int32], width: int, dtype: Any = np.float32) -> NDArray[Any]:
    """Chosen ids [..., k] → [..., E] with ones at the chosen; -1 is no choice."""
    out = np.zeros((*experts.shape[:-1], width + 1), dtype)  # the last column takes the padding
    np.put_along_axis(out, experts.astype(np.intp) % (width + 1), 1, axis=-1)
    return out[..., :width]
