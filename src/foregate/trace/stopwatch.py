"""Nanoseconds of the parts of every MoE layer, measured by hooks.

attention: the token mixer; routing: the router module; dispatch: from its end to the call of the experts; experts: that
call, waits included; expert wait: the part of it in which Foregate's engine waited for weights.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

import torch
from torch import nn

from foregate.trace.capture import LayerCapture

Current = Callable[[], LayerCapture | None]
"""The capture of one layer in the pass that is running; None outside of a pass."""


class Stopwatch:
    """Hooks around one layer. ``stall`` gives the seconds waited for experts so far (None: experts are resident)."""

    def __init__(self, current: Current, stall: Callable[[], float] | None, *, cuda: bool) -> None:
        self._current = current
        self._stall = stall
        self._cuda = cuda
        self._router_end = self._begun = 0
        self._stalled = 0.0

    def attach(self, mixer: nn.Module | None, router: nn.Module | None, experts: nn.Module) -> list[Any]:
        """Register the hooks; returns their handles."""
        handles = []
        if mixer is not None:
            handles += self._around(mixer, "attention_ns")
        if router is not None:
            handles += self._around(router, "routing_ns")
        handles.append(experts.register_forward_pre_hook(self._experts_begin))
        handles.append(experts.register_forward_hook(self._experts_end))
        return handles

    def _around(self, module: nn.Module, name: str) -> list[Any]:
        begun = 0

        def before(*_: Any) -> None:
            nonlocal begun
            begun = self._now()

        def after(*_: Any) -> None:
            now = self._now()
            self._note(name, now - begun)
            if name == "routing_ns":
                self._router_end = now

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after, prepend=True)]

    def _experts_begin(self, *_: Any) -> None:
        self._stalled = self._stall() if self._stall else 0.0
        self._begun = self._now()
        if self._router_end:
            self._note("dispatch_ns", self._begun - self._router_end)
            self._router_end = 0

    def _experts_end(self, *_: Any) -> None:
        self._note("experts_ns", self._now() - self._begun)
        if self._stall:
            self._note("expert_wait_ns", round((self._stall() - self._stalled) * 1e9))

    def _note(self, name: str, nanoseconds: int) -> None:
        capture = self._current()
        if capture is not None:
            capture.timings[name] = capture.timings.get(name, 0) + nanoseconds

    def _now(self) -> int:
        if self._cuda:
            torch.cuda.synchronize()
        return perf_counter_ns()
