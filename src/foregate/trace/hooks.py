"""The hooks that record routing. All of them only look: none returns anything or keeps a tensor without copying it.

Shapes: B sequences, T tokens of a pass, R = B x T rows, k chosen, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foregate.checkpoint.anatomy import FlowWatcher, MoeAnatomy, anatomy
from foregate.errors import TraceError
from foregate.trace.capture import LayerCapture, PassCapture, Wanted, begin_pass
from foregate.trace.routing import MoeLayer, chosen, chosen_scaled, hidden_states, router_scores
from foregate.trace.stopwatch import Stopwatch


class PassRecorder:
    """Appends a PassCapture to ``passes`` for every forward pass of ``model``, until ``close``.

    ``stall`` gives the seconds that the model has waited for experts so far; None where experts are resident.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[MoeLayer],
        wanted: Wanted,
        dtype: torch.dtype,
        stall: Callable[[], float] | None,
    ) -> None:
        self.passes: list[PassCapture] = []
        self._model, self._layers, self._wanted, self._dtype, self._stall = model, layers, wanted, dtype, stall
        self._running: PassCapture | None = None
        self._chosen: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        self._flow = _watch(model, layers) if {"residual", "router_input"} & set(wanted.features) else None
        parts = self._flow.parts if self._flow else [anatomy(model, layer.path, layer.experts) for layer in layers]
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]
        for number, (layer, part) in enumerate(zip(layers, parts, strict=True)):
            self._attach(number, layer, part)

    def close(self) -> None:
        """Remove every hook; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._flow is not None:
            self._flow.close()
        self._running = None

    def _attach(self, number: int, layer: MoeLayer, part: MoeAnatomy) -> None:
        add = self._handles.append
        mixer = part.mixer
        if part.router is not None and (self._wanted.scores or layer.scaled):
            add(part.router.register_forward_hook(self._after_router(number, layer, part)))
        if mixer is not None and "pre_attention" in self._wanted.features:
            add(mixer.register_forward_pre_hook(self._before_mixer(number), with_kwargs=True))
        add(layer.module.register_forward_pre_hook(self._before_experts(number, layer, part), with_kwargs=True))
        if self._wanted.timings:
            cuda = next(self._model.parameters()).device.type == "cuda"
            watch = Stopwatch(lambda: self._current(number), self._stall, cuda=cuda)
            self._handles += watch.attach(mixer, part.router, layer.module)

    def _current(self, number: int) -> LayerCapture | None:
        return None if self._running is None else self._running.layers[number]

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running = begin_pass(args, kwargs, len(self._layers))

    def _end(self, *_: Any) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        if self._flow is not None and self._flow.learning:
            self._flow.stop_learning()
        silent = [layer.path for layer, seen in zip(self._layers, running.layers, strict=True) if seen.index is None]
        if silent:
            raise TraceError(f"{self._wanted.family}: {silent[0]} was not called in a forward pass")
        self.passes.append(running)

    def _after_router(self, number: int, layer: MoeLayer, part: MoeAnatomy) -> Callable[..., None]:
        def after(router: Any, _: Any, output: Any) -> None:
            running = self._running
            if running is None:
                return
            if layer.scaled:
                self._chosen[number] = chosen_scaled(output, int(router.top_k))
            scores = router_scores(output, layer.scaled) if self._wanted.scores else None
            if scores is not None and _fits(scores, running) and scores.shape[-1] >= layer.experts:
                running.layers[number].scores = scores.detach().reshape(running.rows, -1).clone()

        return after

    def _before_mixer(self, number: int) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._running is not None:
                self._keep(self._running, number, "pre_attention", hidden_states(args, kwargs))

        return before

    def _before_experts(self, number: int, layer: MoeLayer, part: MoeAnatomy) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running = self._running
            if running is None:
                return
            choice = self._chosen[number] if layer.scaled else chosen(args, kwargs)
            capture = running.layers[number]
            if choice is None or len(choice[0]) != running.rows or capture.index is not None:
                message = f"{layer.path} was not called once, for all {running.rows} tokens, in one forward pass"
                raise TraceError(f"{self._wanted.family}: {message}")
            capture.index, capture.weights = (value.detach().clone() for value in choice)
            if self._flow is not None:
                self._keep(running, number, "residual", part.residual)
                self._keep(running, number, "router_input", part.router_input)

        return before

    def _keep(self, running: PassCapture, number: int, name: str, value: Tensor | None) -> None:
        """Note a feature, if it is wanted and has one row a token."""
        if name in self._wanted.features and value is not None and _fits(value, running):
            rows = value.detach().reshape(running.rows, -1)
            running.layers[number].features[name] = rows.to(self._dtype, copy=True)


def _watch(model: nn.Module, layers: Sequence[MoeLayer]) -> FlowWatcher:
    return FlowWatcher(model, [layer.path for layer in layers], [layer.experts for layer in layers])


def _fits(value: Tensor, running: PassCapture) -> bool:
    return value.numel() == running.rows * value.shape[-1]
