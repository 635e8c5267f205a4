"""How good are scores on validation prompts: the numbers of early stopping; ``foregate evaluate`` has more.

Shapes: B tokens, L layers, H hops, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foregate.training.view import Targets

CACHE_SHARE = 0.25
"""Share of all experts in the cache over which recall on misses is judged."""


class Judge:
    """Sums over batches; ``metrics`` are rates from 0 to 1.

    ``recall_at_k``: share of the chosen that are among the k best scored. ``recall_on_misses``: the same of the chosen
    that the cache lacks. ``misses_at_equal_bytes``: of n misses of a layer, how many are among the n best scored that
    the cache lacks. All over layers of the same token; ``next_token`` is recall over those of the next.
    """

    def __init__(self, hops: Sequence[int], layers: int) -> None:
        self._hops, self._layers = tuple(hops), layers
        self._sums = {name: torch.zeros(layers, len(hops), dtype=torch.float64) for name in _SUMS}

    def add(self, scores: Tensor, targets: Targets) -> None:
        """``scores`` [B, L, H, E] of all layers."""
        chosen, known = targets.chosen, targets.known.double()
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        count = chosen.sum(-1, keepdim=True)
        hits = (chosen * (rank < count)).sum(-1)
        self._sum("events", known)
        self._sum("chosen", count[..., 0] * known)
        self._sum("hits", hits * known)
        self._sum("top1", (chosen * (rank == 0)).sum(-1) * known)
        self._sum("exact", (hits == count[..., 0]) * known)
        if targets.absent is None:
            return
        missed = chosen * targets.absent
        self._sum("missed", missed.sum(-1) * known)
        self._sum("missed_hits", (missed * (rank < count)).sum(-1) * known)
        wanted = scores.masked_fill(targets.absent == 0, -1e9).argsort(dim=-1, descending=True, stable=True).argsort(-1)
        self._sum("equal_hits", (missed * (wanted < missed.sum(-1, keepdim=True))).sum(-1) * known)

    def metrics(self) -> dict[str, object]:
        """See the class."""
        place = torch.arange(self._layers)[:, None] + torch.tensor(self._hops)
        same = (place < self._layers).double()
        found: dict[str, object] = {
            "recall_at_k": self._rate("hits", "chosen", same),
            "top1": self._rate("top1", "events", same),
            "exact_set": self._rate("exact", "events", same),
            "recall_on_misses": self._rate("missed_hits", "missed", same),
            "misses_at_equal_bytes": self._rate("equal_hits", "missed", same),
            "next_token": self._rate("hits", "chosen", 1 - same),
        }
        by_hop, by_layer = [], []
        for number in range(len(self._hops)):
            only = torch.zeros_like(same)
            only[:, number] = same[:, number]
            by_hop.append({name: self._rate(top, bottom, only) for name, (top, bottom) in _BY_HOP.items()})
            by_layer.append(_rates(self._sums["hits"][:, number], self._sums["chosen"][:, number]))
        found["by_hop"] = dict(zip(map(str, self._hops), by_hop, strict=True))
        found["recall_by_layer"] = dict(zip(map(str, self._hops), by_layer, strict=True))
        return found

    def _sum(self, name: str, values: Tensor) -> None:
        self._sums[name] += values.double().sum(0)

    def _rate(self, top: str, bottom: str, where: Tensor) -> float | None:
        below = float((self._sums[bottom] * where).sum())
        return round(float((self._sums[top] * where).sum()) / below, 6) if below else None


_SUMS = ("events", "chosen", "hits", "top1", "exact", "missed", "missed_hits", "equal_hits")
_BY_HOP = {
    "recall_at_k": ("hits", "chosen"),
    "recall_on_misses": ("missed_hits", "missed"),
    "misses_at_equal_bytes": ("equal_hits", "missed"),
}


def _rates(top: Tensor, bottom: Tensor) -> list[float | None]:
    return [round(a / b, 4) if b else None for a, b in zip(top.tolist(), bottom.tolist(), strict=True)]
