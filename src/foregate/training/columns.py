"""The small columns of traces, decoded once into flat files and mapped. No torch.

Shapes: N tokens of all prompts, L MoE layers, k experts chosen, E experts, both of the widest layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.trace.header import ModelInfo
from foregate.trace.manifest import Entry
from foregate.trace.part import WEIGHT, Part
from foregate.trace.reader import TraceReader
from foregate.training.residency import absent_experts

Array = NDArray[Any]


class Columns:
    """Experts, weights, scores, token ids, positions and phases of every prompt, in files under ``scratch``."""

    def __init__(
        self, found: Sequence[tuple[TraceReader, Entry]], model: ModelInfo, scores: bool, scratch: Path
    ) -> None:
        self._starts = np.cumsum([0, *(entry.tokens for _, entry in found)])
        tokens, layers = int(self._starts[-1]), model.layers
        kinds: dict[str, tuple[str, tuple[int, ...]]] = {
            "experts": ("<i2", (layers, model.width)),
            "weights": ("<f2", (layers, model.width)),
            "token_id": ("<i4", ()),
            "position": ("<i4", ()),
            "decode": ("|b1", ()),
        }
        if scores:
            kinds["scores"] = ("<f2", (layers, max(model.experts_per_layer)))
        scratch.mkdir(parents=True, exist_ok=True)
        self._maps = {
            name: np.lib.format.open_memmap(scratch / f"{name}.npy", "w+", np.dtype(kind), (tokens, *shape))
            for name, (kind, shape) in kinds.items()
            if tokens
        }
        for number, part in enumerate(_parts(found)):
            for name, values in _decoded(part, model, scores).items():
                self._maps[name][self._starts[number] : self._starts[number + 1]] = values

        self._experts = model.experts_per_layer
        self._scratch = scratch
        self._absent: dict[float, tuple[Array, set[int]]] = {}

    def absent(self, number: int, share: float) -> NDArray[np.uint8]:
        """``residency.absent_experts`` of prompt ``number``, worked out when first asked for, [T, L, E]."""
        rows = slice(int(self._starts[number]), int(self._starts[number + 1]))
        if share not in self._absent:
            shape = (int(self._starts[-1]), len(self._experts), max(self._experts))
            path = self._scratch / f"absent-{share:g}.npy"
            self._absent[share] = np.lib.format.open_memmap(path, "w+", np.dtype("u1"), shape), set()
        values, done = self._absent[share]
        if number not in done:
            experts = self._maps["experts"][rows].astype(np.int64)
            first = np.arange(len(experts)) == 0
            values[rows] = absent_experts(experts, first, self._experts, share)
            done.add(number)
        found: NDArray[np.uint8] = values[rows]
        return found

    def of(self, number: int) -> dict[str, Any]:
        """Views of the rows of prompt ``number``; ``scores`` is None where the traces have none."""
        rows = slice(int(self._starts[number]), int(self._starts[number + 1]))
        return {"scores": None, **{name: values[rows] for name, values in self._maps.items()}}


def _parts(found: Sequence[tuple[TraceReader, Entry]]) -> Any:
    """Parts of ``found`` in its order: that of the traces, and of the manifest within a trace."""
    for reader in dict.fromkeys(reader for reader, _ in found):
        yield from reader.parts(prompts={entry.prompt for r, entry in found if r is reader}, order=WEIGHT)


def _decoded(part: Part, model: ModelInfo, scores: bool) -> dict[str, Array]:
    weights = part.weights
    columns = {
        "experts": part.grid(np.where(np.isnan(weights), -1, part.experts.astype(np.int64))),
        "weights": part.grid(np.nan_to_num(weights)),
        "token_id": part.grid(part.token_id)[:, 0],
        "position": part.grid(part.position)[:, 0],
        "decode": part.grid(part.decode)[:, 0],
    }
    if scores:
        columns["scores"] = part.grid(part.scores)[:, :, : max(model.experts_per_layer)]
    return columns
