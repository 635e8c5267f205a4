"""Nanoseconds of the parts of every MoE layer under vLLM, eager mode only.

attention: the token mixer; routing: router weights and choice; dispatch: from the choice to the call of the experts (in
it: the copying of what is recorded); experts: that call. As in trace/stopwatch.py, whose layers are transformers'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

import torch
from torch import nn

from foregate.trace import format as fmt
from foregate.trace.vllm.layers import VllmLayer
from foregate.trace.vllm.tap import LayerPass

TIMINGS = fmt.TIMINGS[:-1]
"""All but the wait for experts: vLLM has none."""


Current = Callable[[int], LayerPass | None]
"""The open pass of the layer with this number (from 0); None outside of a pass."""


class LayerClock:
    """Hooks around every layer. To be made before the tap, which stands in front of it, and closed after it."""

    def __init__(self, layers: Sequence[VllmLayer], current: Current, *, cuda: bool) -> None:
        self._current, self._cuda, self._layers = current, cuda, layers
        self._chosen = [0] * len(layers)
        self._handles: list[Any] = []
        for number, layer in enumerate(layers):
            self._hook(number, layer.mixer, "attention_ns")
            self._hook(number, layer.gate, "routing_ns")
            layer.router._compute_routing = self._routing(number, layer.router._compute_routing)
            layer.routed.forward_modular = self._experts(number, layer.routed.forward_modular)

    def close(self) -> None:
        """Take everything away again."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            del layer.router._compute_routing
            del layer.routed.forward_modular

    def _hook(self, number: int, module: nn.Module | None, name: str) -> None:
        if module is None:
            return
        begun = 0

        def before(*_: Any) -> None:
            nonlocal begun
            begun = self._now()

        def after(*_: Any) -> None:
            self._add(number, name, self._now() - begun)

        self._handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _routing(self, number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def compute_routing(*args: Any, **kwargs: Any) -> Any:
            begun = self._now()
            result = original(*args, **kwargs)
            self._chosen[number] = self._now()
            self._add(number, "routing_ns", self._chosen[number] - begun)
            return result

        return compute_routing

    def _experts(self, number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward_modular(*args: Any, **kwargs: Any) -> Any:
            begun = self._now()
            self._add(number, "dispatch_ns", begun - self._chosen[number])
            result = original(*args, **kwargs)
            self._add(number, "experts_ns", self._now() - begun)
            return result

        return forward_modular

    def _add(self, number: int, name: str, nanoseconds: int) -> None:
        seen = self._current(number)
        if seen is not None:
            seen.timings[name] = seen.timings.get(name, 0) + nanoseconds

    def _now(self) -> int:
        if self._cuda:
            torch.cuda.synchronize()
        return perf_counter_ns()
