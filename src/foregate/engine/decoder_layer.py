"""Decoder layers of a decode step up to their experts in one compiled call: norm, attention, sum, norm and router.

transformers spends seven modules and some 40 calls of torch a layer around what the kernels do in one. Which layers
are taken is decided when the model is built: by their parts, each of them a kernel's already, and then by trial, as the
bits must be those of the layer's own forward. Everything unusual at a call goes on to that forward: a hook of a
stranger on a part, a mask, more tokens. Signals are told what their hooks would have seen.

Shapes: D hidden, E experts, k chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from foregate.checkpoint.anatomy import MoeAnatomy
from foregate.engine import attention, attention_block
from foregate.engine.clock import Clock
from foregate.engine.experts_interface import in_interface, standing_in
from foregate.engine.following import Following
from foregate.engine.kv_room import RoomyLayer, make_room
from foregate.engine.norms import native_norm
from foregate.engine.router import native_router, undecided
from foregate.engine.signals import ModelSignals
from foregate.engine.unchanged import Unchanged
from foregate.native import kernels
from foregate.native.decoder_layer import Call, DecoderLayer, Turns, fits, turned
from foregate.native.residents import Residents
from foregate.types import ExpertKey, ExpertLayout

Forward = Callable[..., Any]
OnOff = NDArray[np.int32]
"""[1]: 0 is off."""

log = logging.getLogger("foregate")


class DecoderLayers:
    """The decoder layers around ``signals.parts`` that the kernels can compute, until ``close``."""

    def __init__(self, model: nn.Module, signals: ModelSignals, clock: Clock) -> None:
        self.layers: list[Layer] = []
        rotary = next(filter(attention_block.is_rotary, model.modules()), None)
        for number, part in enumerate(signals.parts if rotary is not None else ()):
            made = (Layer(number, part, *kernel, signals, clock) for kernel in _kernels(part))
            found = next((layer for layer in made if agreed(partial(_agrees, layer, rotary))), None)
            if found is not None:
                self.layers.append(found)
                object.__setattr__(part.decoder, "forward", found.forward)

    def watch(self, where: NDArray[np.int32], slots: int, layout_of: Callable[[ExpertKey], ExpertLayout]) -> OnOff:
        """Have the layers begin experts that are resident in one of ``slots`` according to ``where`` [L, E], while what
        this returns is not 0: to be set by whoever ends them."""
        on = np.zeros(1, np.int32)
        tables: list[tuple[ExpertLayout, int, NDArray[np.uint64]]] = []
        for layer in self.layers:
            layout, down = layout_of(ExpertKey(layer.number, 0)), getattr(layer.part.experts_module, "down_proj", None)
            if not isinstance(down, Tensor) or layer.part.experts > where.shape[1]:
                continue
            width = down.shape[-1]
            table = next((there for known, size, there in tables if (known, size) == (layout, width)), None)
            if table is None:
                table = np.zeros(slots, np.uint64)
                tables.append((layout, width, table))
            layer.kernel.begin_residents(Residents(where[layer.number], table, on, width))
        return on

    def close(self) -> None:
        """The model is as it was."""
        for layer in self.layers:
            layer.kernel.begin_residents(None)
            layer.part.decoder.__dict__.pop("forward", None)
        self.layers.clear()


# What a layer consists of


def _kernels(part: MoeAnatomy) -> Iterator[tuple[DecoderLayer, nn.Module]]:
    """The kernels' layers that ``part`` may be, each with the norm before the router: which is which, a trial tells."""
    own, children = part.decoder, list(part.decoder.children())
    block = None if part.mixer is None else attention_block.native_block(part.mixer)
    router = None if part.router is None else native_router(part.router)
    norms = [child for child in children if child not in (part.mixer, part.block)]
    plain = not [*own.parameters(recurse=False), *own.buffers(recurse=False), *part.block.parameters(recurse=False)]
    if block is None or router is None or not plain or len(children) != 4 or len(norms) != 2:
        return
    if set(part.block.children()) != {part.router, part.experts_module}:
        return
    if not in_interface(part.experts_module):
        return
    for before, after in (norms, norms[::-1]):
        first, second = native_norm(before), native_norm(after)
        if first is not None and second is not None and fits(block, first, second, router):
            yield DecoderLayer(block, first, second, router), after


# What takes the place of a layer's forward


class Layer:
    """Calls ``kernel`` and the engine's experts in place of the modules of ``part``; ``after``: its second norm."""

    def __init__(
        self, number: int, part: MoeAnatomy, kernel: DecoderLayer, after: nn.Module, signals: ModelSignals, clock: Clock
    ) -> None:
        assert part.mixer is not None
        assert part.router is not None
        self.part, self.kernel, self.index = part, kernel, attention_block.layer_of(part.mixer)
        self.theirs: Forward = part.decoder.forward
        self.signals = signals
        self.number, self._after, self._clock = number, after, clock
        self._settle = undecided(part.router)
        self._experts: Any = part.experts_module
        self.begun = 0
        """How often anybody has begun."""
        decoder, *inner = part.decoder.modules()
        self._inner = Unchanged(inner, signals.hooked(number), parents=[decoder])

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own, or ours where nothing is unusual."""
        usual = not args and self.alone() and attention.is_on() and attention_block.is_usual(kwargs)
        ours = self.ours(hidden_states, kwargs) if usual else None
        return self.theirs(hidden_states, *args, **kwargs) if ours is None else ours

    def alone(self) -> bool:
        """Whether nobody but the signals watches the parts, they have learned what they watch, and all is as before."""
        return self._inner(self.signals.hooks(self.number)) and self.part.norm is self._after

    def ours(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """[1, 1, D] for ``x`` [1, 1, D]; None where that or the cache is another one."""
        past, turns, block = kwargs.get("past_key_values"), kwargs["position_embeddings"], self.kernel.attention
        held = past.layers[self.index] if type(past) is DynamicCache and self.index < len(past.layers) else None
        if type(held) is not RoomyLayer or not block.takes(x, *turns):
            return None
        routed = self.begin(x.data_ptr(), turned(*turns), held)
        return None if routed is None else self.end(routed, held, Following()).clone()

    def begin(self, x: int, turns: Turns, held: RoomyLayer) -> bool | None:
        """All up to the router for D numbers (bf16) at ``x`` in memory: whether that could tell its choice. None, and
        nothing done, where ``held`` does not suit. ``end`` goes on, or nobody does."""
        kernel, signals, number = self.kernel, self.signals, self.number
        place = held.place(kernel.attention.shared, kernel.attention.width)
        if place is None:
            return None
        if signals.early:
            kernel.norm(x)
            signals.before_attention(number, kernel.normed)
        self.begun += 1
        return self._clock.timed(kernel, x, turns, place, signals.early)

    def prepared(self, turns: Turns, held: RoomyLayer) -> Call | None:
        """What ``begin`` calls, for an input that is still to come; None where it does more, or nothing."""
        place = None if self.signals.early else held.place(self.kernel.attention.shared, self.kernel.attention.width)
        return None if place is None else (self.kernel, turns, place)

    def end(self, routed: bool, held: RoomyLayer, then: Following) -> Tensor:
        """[1, 1, D], overwritten by the next token, after a ``begin``: the experts are added, and ``then`` follows at
        once."""
        kernel, experts = self.kernel, self._experts
        held.grow()
        self.signals.after_attention(self.number, kernel)
        runtime, layer = experts._foregate
        if routed:
            runtime.forward_one(layer, experts, kernel, then)
            return kernel.hidden
        routing = self._settle(kernel.routed)
        if kernel.settle(*routing):
            runtime.forward_one(layer, experts, kernel, then)
            return kernel.hidden
        kernels.drop_begun_experts()
        self.signals.chosen(self.number, routing)
        _, weights, index = routing
        kernel.take(runtime.forward(layer, experts, kernel.routed, index, weights))
        then()
        return kernel.hidden


# Trial


def agreed(trial: Callable[[], bool]) -> bool:
    """What ``trial`` says. A stranger's module that breaks in it is left alone."""
    try:
        return trial()
    except Exception as error:
        log.info("a trial of the compiled decode step broke (%s: %s)", type(error).__name__, error)
        return False


class TrialExperts:
    """Stands in for the engine's experts behind ``router``: something that depends on all it is told."""

    def __init__(self, router: Any) -> None:
        self.told: list[Tensor] = []
        self._router = router

    def forward(self, layer: int, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        logits = self._router.forward(x)[0]
        self.told += [x.clone(), index.clone(), weights.float().clone(), logits.float().clone()]
        if len(x) > 1 or not kernels.combines(x, weights):
            return (x.float() * (weights.float() * (index + 1)).sum(dim=1, keepdim=True)).to(x.dtype)
        return kernels.combine(self._parts(x, index), weights)

    def forward_one(self, layer: int, module: nn.Module, kernel: DecoderLayer, then: Following) -> None:
        choice = kernel.choice
        choice.parts.copy_(self._parts(kernel.routed, choice.index))
        kernel.mix()
        then()
        self.told += [kernel.routed.clone(), torch.from_numpy(choice.experts.copy())]
        self.told += [torch.from_numpy(part.copy()) for part in (choice.shares, choice.scores)]

    def _parts(self, x: Tensor, index: Tensor) -> Tensor:
        return (x.float() * (1 + index[0, :, None])).to(x.dtype)


@torch.inference_mode()
def _agrees(layer: Layer, rotary: Any) -> bool:
    """Whether ours gives the bits of the layer's own forward, and tells experts and signals the same."""
    block = layer.kernel.attention
    with attention.decoding():
        for position, size in attention_block.TRIALS:
            given = attention_block.token_at(position, size, block.inputs, rotary)
            theirs = _run(layer, _theirs, given, position)
            for _ in layer.signals.every_way():
                ours = _run(layer, _ours, given, position)
                if len(theirs) != len(ours) or not all(map(attention_block.same, theirs, ours)):
                    return False
    return True


def _theirs(layer: Layer, given: dict[str, Any]) -> Any:
    return layer.theirs(**given)


def _ours(layer: Layer, given: dict[str, Any]) -> Any:
    return layer.ours(given["hidden_states"], given)


def _run(layer: Layer, forward: Callable[..., Any], given: dict[str, Any], seed: int) -> list[Any]:
    """What ``forward`` returns, tells, and leaves in a cache of random numbers."""
    block, part = layer.kernel.attention, layer.part
    past = DynamicCache()
    past.update(*attention_block.cached(block.shared, block.width, seed), layer.index)
    make_room(past)
    with standing_in(part.experts_module, TrialExperts(part.router)) as experts:
        returned = forward(layer, {**given, "past_key_values": past})
    seen = [None if x is None else x.clone() for x in (part.pre_attention, part.router_input)]
    part.pre_attention = part.residual = part.router_input = part.compiled = None
    held: Any = past.layers[layer.index]
    return [returned, *experts.told, *seen, held.keys, held.values]
