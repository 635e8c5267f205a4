"""How far a lossy run departed from what its routers chose, in decode: counts that add up over runs.

Shapes: T tokens, k experts chosen.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Deviation:
    """``token_layers``: pairs of token and layer. Mass: share of the router's weight, summed over token-layers."""

    token_layers: int = 0
    experts: int = 0
    """Chosen by the routers."""
    affected_experts: int = 0
    affected_mass: float = 0.0
    affected_layers: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        raise NotImplementedError

    def add(self, other: Deviation) -> None:
        """Add the counts of ``other``, which is of the same mode."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def since(self, before: Deviation) -> Deviation:
        """What was counted after ``before``, an earlier copy of this."""
        return type(self)(**{one.name: getattr(self, one.name) - getattr(before, one.name) for one in fields(self)})

    def _count(self, index: Tensor, weights: Tensor, hit: Tensor) -> Tensor:
        """``hit`` [T, k]: which of the chosen experts are affected. Their weight, [T]."""
        of = weights.float()
        weight = (of * hit).sum(dim=1)
        share = weight / of.sum(dim=1).clamp_min(1e-20)
        self.token_layers += len(index)
        self.experts += index.numel()
        self.affected_experts += int(hit.sum())
        self.affected_layers += int(hit.any(dim=1).sum())
        self.affected_mass += float(share.sum())
        return weight

    def _shares(self) -> tuple[float, float, float]:
        """Of experts, of router mass, and of token-layers."""
        layers, experts = max(1, self.token_layers), max(1, self.experts)
        return self.affected_experts / experts, self.affected_mass / layers, self.affected_layers / layers


@dataclass(slots=True)
class PredictedLayers(Deviation):
    """execute-predicted. Affected: what the router chose and did not get."""

    predicted: int = 0
    """Token-layers that ran a prediction, and ``agreed``: of these, with the router's own set."""
    agreed: int = 0

    def count(self, index: Tensor, weights: Tensor, executed: Tensor | None) -> None:
        """One token of one layer, [1, k]; ``executed`` None: it ran exactly."""
        if executed is None:
            self._count(index, weights, torch.zeros_like(index, dtype=torch.bool))
            return
        gone = ~torch.isin(index, executed)
        self._count(index, weights, gone)
        self.predicted += 1
        self.agreed += not bool(gone.any())

    def as_dict(self) -> dict[str, Any]:
        experts, mass, _ = self._shares()
        return {
            "token_layers": self.token_layers,
            "predicted_layers": self.predicted,
            "predicted_share": self.predicted / max(1, self.token_layers),
            "set_agreement": self.agreed / self.predicted if self.predicted else 1.0,
            "chosen_not_run": experts,
            "router_mass_not_run": mass,
        }


@dataclass(slots=True)
class PartsLeftOut(Deviation):
    """skip-late. Affected: what was left out."""

    def count(self, index: Tensor, weights: Tensor, experts: Collection[int]) -> Tensor:
        """One layer; the weight [T] that ``experts`` would have had."""
        return self._count(index, weights, _among(index, experts))

    def as_dict(self) -> dict[str, Any]:
        experts, mass, layers = self._shares()
        return {
            "token_layers": self.token_layers,
            "skipped_experts": self.affected_experts,
            "skipped_share": experts,
            "skipped_mass": mass,
            "layers_with_skips": layers,
            "weights": "renormalised",
        }


@dataclass(slots=True)
class PartsLow(Deviation):
    """low-precision-miss. Affected: what was computed in low precision, which read ``saved_bytes`` less."""

    saved_bytes: int = 0

    def count(self, index: Tensor, weights: Tensor, experts: Collection[int], saved_bytes: int) -> None:
        """One layer, whose ``experts`` were read in low precision."""
        self._count(index, weights, _among(index, experts))
        self.saved_bytes += saved_bytes

    def as_dict(self) -> dict[str, Any]:
        experts, mass, layers = self._shares()
        return {
            "token_layers": self.token_layers,
            "low_precision_experts": self.affected_experts,
            "low_precision_share": experts,
            "low_precision_mass": mass,
            "layers_with_low_precision": layers,
            "saved_bytes": self.saved_bytes,
        }


def _among(index: Tensor, experts: Collection[int]) -> Tensor:
    return torch.isin(index, torch.tensor(sorted(experts), dtype=index.dtype))
