"""What one prompt's routing is in memory, on its way into a trace. No torch.

Shapes: T tokens, L MoE layers, k width of the expert lists, S width of the score lists, D feature size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.errors import TraceError
from foregate.trace.format import NOT_MEASURED, padding
from foregate.trace.header import FeatureInfo, Header

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """The routing of one prompt; tokens in the order in which they were routed.

    ``positions``, ``token_ids``, ``decode``, ``passes`` are [T]; ``experts`` and ``weights`` [T, L, k], in the router's
    order, padded with the largest id of the header's type and NaN where a layer chooses fewer; ``scores`` [T, L, S];
    ``timings`` [T, L] nanoseconds, of a pass in the row of its first token, -1 elsewhere; ``features`` [T, L, D], as
    float16 or as the bits (uint16) of bfloat16.
    """

    prompt: str
    domain: str
    positions: Array
    token_ids: Array
    decode: Array
    passes: Array
    experts: Array
    weights: Array
    scores: Array | None = None
    timings: Mapping[str, Array] = field(default_factory=dict)
    features: Mapping[str, Array] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.positions)

    def check(self, header: Header) -> None:
        """Raises TraceError, naming the prompt, where this does not fit the trace of ``header``."""
        self._check_shapes(header)
        self._check_experts(header)
        if set(self.timings) != set(header.timings):
            raise self._wrong(f"timings {sorted(self.timings)}, the trace has {sorted(header.timings)}")
        for name, values in self.timings.items():
            if values.shape != self.experts.shape[:2] or int(values.min()) < NOT_MEASURED:
                raise self._wrong(f"{name} of shape {values.shape}, at least {values.min()}")
        if set(self.features) != set(header.features):
            raise self._wrong(f"features {sorted(self.features)}, the trace has {sorted(header.features)}")
        for name, info in header.features.items():
            self._check_feature(name, info)

    def _check_shapes(self, header: Header) -> None:
        grid = (self.tokens, header.model.layers, header.model.width)
        if not self.tokens:
            raise self._wrong("no tokens")
        if self.experts.shape != grid or self.weights.shape != grid:
            raise self._wrong(f"experts {self.experts.shape} and weights {self.weights.shape}, the trace has {grid}")
        for name in ("token_ids", "decode", "passes"):
            if getattr(self, name).shape != (self.tokens,):
                raise self._wrong(f"{name} of shape {getattr(self, name).shape} for {self.tokens} tokens")
        width = header.scores.width if header.scores else None
        found = None if self.scores is None else self.scores.shape
        if found != (None if width is None else (*grid[:2], width)):
            raise self._wrong(f"router scores of shape {found}, the trace has width {width}")

    def _check_experts(self, header: Header) -> None:
        model = header.model
        pad = padding(model.expert_dtype)
        for layer, (count, chosen) in enumerate(zip(model.experts_per_layer, model.top_k, strict=True)):
            ids = self.experts[:, layer]
            if ids[:, :chosen].max() >= count or ids[:, :chosen].min() < 0 or (ids[:, chosen:] != pad).any():
                raise self._wrong(f"experts of MoE layer {layer} that are not {chosen} ids below {count}")

    def _check_feature(self, name: str, info: FeatureInfo) -> None:
        values = self.features[name]
        expected = np.dtype(np.float16 if info.dtype == "float16" else np.uint16)
        if values.shape != (*self.experts.shape[:2], *info.shape) or values.dtype != expected:
            raise self._wrong(f"feature {name} of shape {values.shape} and type {values.dtype}")

    def _wrong(self, what: str) -> TraceError:
        return TraceError(f"prompt {self.prompt!r}: {what}")
