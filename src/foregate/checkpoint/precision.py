"""In which form a pack keeps which weights: the experts, those of them that are kept finer, the dense matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foregate.checkpoint.quantise import PLAIN, Scheme, parse_scheme, quantised_layout
from foregate.checkpoint.skeleton import ExpertsModule
from foregate.types import ExpertKey, ExpertLayout


@dataclass(frozen=True, slots=True)
class Precision:
    """``kept_experts`` are stored as ``kept``, all others as ``experts``; ``dense`` is for dense matrices."""

    experts: Scheme = PLAIN
    dense: Scheme = PLAIN
    kept: Scheme = PLAIN
    kept_experts: frozenset[ExpertKey] = frozenset()

    @property
    def plain(self) -> bool:
        """Whether everything is as the source has it."""
        return not (self.experts.bits or self.dense.bits)

    @property
    def name(self) -> str:
        """For people: ``int4/32, 12 experts source, dense int8``."""
        kept = f", {len(self.kept_experts)} experts {self.kept.name}" if self.kept_experts else ""
        return f"{self.experts.name}{kept}" + (f", dense {self.dense.name}" if self.dense.bits else "")

    def scheme(self, key: ExpertKey) -> Scheme:
        """How ``key`` is stored."""
        return self.kept if key in self.kept_experts else self.experts

    def layouts(self, module: ExpertsModule, plain: ExpertLayout) -> tuple[ExpertLayout, ExpertLayout]:
        """The slot of an ordinary and of a kept expert of ``module``."""
        ordinary = quantised_layout(plain, self.experts, module.transposed)
        return ordinary, quantised_layout(plain, self.kept, module.transposed) if self.kept_experts else ordinary

    def to_json(self) -> dict[str, Any]:
        return {"experts": self.experts.name, "kept": self.kept.name, "dense": self.dense.name}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], kept_experts: frozenset[ExpertKey]) -> Precision:
        """Raises KeyError or ConfigError (a ValueError) for what it does not know."""
        schemes = {name: parse_scheme(str(content[name])) for name in ("experts", "kept", "dense")}
        return cls(**schemes, kept_experts=kept_experts)


AS_SOURCE = Precision()
