"""The MoE layers of a model as vLLM built it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from foregate.checkpoint.anatomy import find_mixer
from foregate.errors import TraceError
from foregate.trace.vllm.versions import reach

RUNNER = "MoERunner"
"""Name of the class (or a base of it) of the modules that route and run experts."""

_DECODER = re.compile(r"^(?P<decoder>.*?\.(?P<number>\d+))\.(?P<block>[^.]+)(?:\.|$)")


class LayerShape(NamedTuple):
    """Decoder layer, E experts and k chosen of one MoE layer."""

    number: int
    experts: int
    top_k: int


@dataclass(frozen=True, slots=True)
class VllmLayer:
    """One MoE layer: decoder layer ``number``, E ``experts``, ``top_k`` chosen. ``routed`` runs the experts.

    ``gate`` (router weights) and ``mixer`` (attention) serve timings; None where they were not found.
    """

    number: int
    router: Any
    routed: Any
    experts: int
    top_k: int
    gate: nn.Module | None
    mixer: nn.Module | None

    @property
    def shape(self) -> LayerShape:
        return LayerShape(self.number, self.experts, self.top_k)


def find_layers(model: nn.Module) -> list[VllmLayer]:
    """In execution order. Raises TraceError for a model without experts, and for kernels that route inside."""
    found = [_layer(model, path, module) for path, module in model.named_modules() if _is_runner(module)]
    if not found:
        raise TraceError(f"{type(model).__name__} has no MoE layer that vLLM runs through {RUNNER}: nothing to trace")
    return sorted(found, key=lambda layer: layer.number)


def _is_runner(module: nn.Module) -> bool:
    return any(base.__name__ == RUNNER for base in type(module).__mro__)


def _layer(model: nn.Module, path: str, runner: nn.Module) -> VllmLayer:
    if reach(runner, "is_monolithic"):
        kernel = type(reach(runner, "routed_experts.quant_method")).__name__
        raise TraceError(f"{path}: the kernel of {kernel} routes inside, where nothing can be recorded; use another")
    place = _DECODER.match(path)
    decoder = model.get_submodule(place["decoder"]) if place else None
    block = decoder.get_submodule(place["block"]) if decoder and place else None
    reach(runner, "router._compute_routing")
    return VllmLayer(
        number=int(reach(runner, "layer_id")),
        router=reach(runner, "router"),
        routed=reach(runner, "routed_experts"),
        experts=int(reach(runner, "moe_config.num_logical_experts")),
        top_k=int(reach(runner, "moe_config.experts_per_token")),
        gate=_gate(runner, block),
        mixer=find_mixer(decoder, block) if decoder is not None and block is not None else None,
    )


def _gate(runner: nn.Module, block: nn.Module | None) -> nn.Module | None:
    """The module that multiplies with the router's weights: the runner's own, or a sibling."""
    places = ((runner, "gate"), (block, "gate"), (block, "router"))
    found = (getattr(owner, name, None) for owner, name in places)
    return next((gate for gate in found if isinstance(gate, nn.Module)), None)
