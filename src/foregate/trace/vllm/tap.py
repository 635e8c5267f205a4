"""Copies of what the routers choose, layer by layer, while a pass is open.

Shapes: R rows of a pass (padding included), k chosen, E experts, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from foregate.errors import TraceError
from foregate.trace.vllm.layers import VllmLayer


@dataclass(slots=True)
class LayerPass:
    """One layer in one pass: ``experts`` and ``weights`` [R, k], ``scores`` [R, E] (logits), nanoseconds."""

    experts: Tensor | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None
    timings: dict[str, int] = field(default_factory=dict)


class RouterTap:
    """Stands in front of the method of every router that chooses. What it returns is what the router returned."""

    def __init__(self, layers: Sequence[VllmLayer], *, scores: bool) -> None:
        self._layers, self._scores = layers, scores
        self.open: list[LayerPass] | None = None
        self._originals = [layer.router._compute_routing for layer in layers]
        for number, layer in enumerate(layers):
            # logical ids: a load balancer, if there is one, renames the experts after this
            layer.router._compute_routing = self._stand_in(number, self._originals[number])

    def begin(self) -> None:
        """Open a pass. Calls outside of one (warm-up) are not kept."""
        self.open = [LayerPass() for _ in self._layers]

    def end(self) -> list[LayerPass]:
        """Close the pass and return it. Raises TraceError where a layer was not called."""
        found, self.open = self.open, None
        assert found is not None, "end() without begin()"
        for layer, seen in zip(self._layers, found, strict=True):
            if seen.experts is None:
                raise TraceError(f"vLLM: decoder layer {layer.number} routed nothing in a forward pass")
        return found

    def cancel(self) -> None:
        """Close the pass and forget it."""
        self.open = None

    def close(self) -> None:
        """Give every router its own method back."""
        self.cancel()
        for layer, original in zip(self._layers, self._originals, strict=True):
            layer.router._compute_routing = original

    def _stand_in(self, number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def compute_routing(hidden_states: Tensor, router_logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            weights, experts = original(hidden_states, router_logits, *args, **kwargs)
            if self.open is not None:
                self._keep(number, weights, experts, router_logits)
            return weights, experts

        return compute_routing

    def _keep(self, number: int, weights: Tensor, experts: Tensor, logits: Tensor) -> None:
        assert self.open is not None
        seen = self.open[number]
        if seen.experts is not None:
            message = f"decoder layer {self._layers[number].number} routed twice in one forward pass"
            raise TraceError(f"vLLM: {message}; rows cannot be told apart")
        seen.experts, seen.weights = experts.detach().clone(), weights.detach().clone()
        if self._scores:
            seen.scores = logits.detach().clone()
