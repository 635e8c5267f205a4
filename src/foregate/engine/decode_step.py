"""A decode step without the forward of transformers' model around its layers: embedding, layers, norm, head.

That forward makes a mask of nothing, positions, and keyword arguments for every layer: 0.8 ms a token. Taken where
layers are of ``engine/decoder_layer.py`` (others are called as they are) and a trial gives the bits of that forward;
what is unusual at a call (a hook of a stranger) goes on to it.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from foregate.checkpoint.anatomy import MoeAnatomy
from foregate.engine import attention
from foregate.engine.attention_block import same
from foregate.engine.clock import Clock
from foregate.engine.decoder_layer import DecoderLayers, Layer, TrialExperts, agreed
from foregate.engine.dense import native_linear
from foregate.engine.experts_interface import in_interface, standing_in
from foregate.engine.following import Following
from foregate.engine.kv_room import RoomyLayer, make_room
from foregate.engine.norms import native_norm
from foregate.engine.turns import Positions
from foregate.engine.unchanged import Unchanged
from foregate.native.decoder_layer import Call, DecoderLayer, Turns
from foregate.native.head import Head

BASE, PARTS = {"model", "lm_head"}, {"embed_tokens", "layers", "norm", "rotary_emb"}
"""Children of a model, and of what is inside it."""

PROMPT, TOKEN = (1, 2), 0
"""Of a trial."""


class DecodeStep:
    """Steps of ``model``, whose MoE layers are ``parts``, by its ``layers``. ``ready``: whether it can be at all."""

    def __init__(
        self, model: PreTrainedModel, layers: DecoderLayers, parts: Sequence[MoeAnatomy], clock: Clock
    ) -> None:
        self.layers, self.ready = layers.layers, False
        self._ahead: _Ahead | None = None
        if not _is_plain(model):
            return
        base: Any = model.model
        blocks = {(block.inputs, block.width) for block in (layer.kernel.attention for layer in self.layers)}
        if len(blocks) != 1 or not all(in_interface(part.experts_module) for part in parts):
            return
        ours = {layer.part.decoder: layer for layer in self.layers}
        self._decoders = [(decoder, ours.get(decoder)) for decoder in base.layers]
        self._norm: Any = base.norm
        self._head: Any = model.lm_head
        norm, head = native_norm(base.norm), native_linear(model.lm_head)
        kept = [*model.lm_head.parameters(), *model.lm_head.buffers()]
        self._native = Head(norm, head, kept) if norm is not None and head is not None else None
        self._clock = clock
        self._embedding = _Embedding(base.embed_tokens)
        around = [model, base, base.embed_tokens, self._norm, base.rotary_emb, self._head, base.layers, *base.layers]
        self._around = Unchanged(around)
        self._usual, self._hooks = False, -1
        self._routed: bool | None = None
        """What the next layer has said, if it has begun."""
        self._logits: Tensor | None = None
        self.ready = agreed(partial(self._tried, model, parts))

    def _tried(self, model: PreTrainedModel, parts: Sequence[MoeAnatomy]) -> bool:
        base: Any = model.model
        rotary, attends = base.rotary_emb, self.layers[0].kernel.attention
        self._positions = Positions(rotary, attends, self._embedding(TOKEN))
        return _agrees(model, self, parts)

    def close(self) -> None:
        """From now on the model's own forward."""
        self.ready = False
        self.forget()

    def begin(self) -> None:
        """A text begins: look at everything again. Later only hooks are noticed, by the number that torch gives each:
        looking at all modules for every token takes 0.3 ms."""
        self._usual = False
        self.forget()
        if self.ready:
            self._positions.forget()

    def forget(self) -> None:
        """What ``go_ahead`` has begun will not be asked for. From any thread."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.layer.kernel.drop_residents()

    def go_ahead(self, token: int, past: Any) -> None:
        """Begin what a call for these will go on with if it comes next: the first layer up to its router, and what that
        has begun. Nothing that lasts is changed. Nobody is asked before attention then: it would be too soon."""
        self.forget()
        layer = self._decoders[0][1] if self._suits(past) else None
        if layer is None or layer.signals.early:
            return
        place, position = self._embedding.place(token), past.get_seq_length()
        routed = self._begun(0, place, self._positions.turns(position), past) if place else None
        if routed is not None:
            self._ahead = _Ahead(token, past, position, layer, layer.begun, routed)
            layer.kernel.leave_residents()

    def _gone_ahead(self, token: int, past: Any, position: int) -> bool | None:
        """What the first layer has said to this token, if it has begun and nobody has used it since."""
        ahead = self._ahead
        if ahead is None:
            return None
        same = (ahead.token, ahead.position, ahead.begun) == (token, position, ahead.layer.begun)
        if not same or ahead.past is not past or ahead.layer.signals.early:
            self.forget()
            return None
        self._ahead = None
        return ahead.routed

    def __call__(self, token: int, past: Any) -> Tensor | None:
        """Logits [V] after ``token``, which ``past`` then holds, overwritten by the next; None, and nothing done, where
        something is unusual."""
        if self._suits(past):
            return self.logits(token, past)
        self.forget()
        return None

    def _suits(self, past: Any) -> bool:
        """Whether nothing is unusual."""
        if not self.ready or not self.layers or not attention.is_on():
            return False
        if type(past) is not DynamicCache or {type(held) for held in past.layers} != {RoomyLayer}:
            return False
        if not self._usual or self._hooks != RemovableHandle.next_id:
            self._hooks = RemovableHandle.next_id
            self._usual = self._around() and all(layer.alone() for layer in self.layers)
        return self._usual

    def logits(self, token: int, past: DynamicCache) -> Tensor:
        """As a call, without most of its questions."""
        position = past.get_seq_length()
        turns = self._positions.turns(position)
        self._routed, self._logits = self._gone_ahead(token, past, position), None
        x = self._embedding(token)
        for number, (decoder, layer) in enumerate(self._decoders):
            routed, self._routed = self._routed, None
            if routed is None:
                routed = self._begun(number, x.data_ptr(), turns, past)
            if layer is None or routed is None:
                x = self._theirs(past, position, decoder, x)
            else:
                held: Any = past.layers[layer.index]
                x = layer.end(routed, held, _Next(self, layer.kernel, number + 1, turns, past))
        return self._told(x) if self._logits is None else self._logits

    def _begun(self, number: int, x: int, turns: Turns | None, past: DynamicCache) -> bool | None:
        """What ``Layer.begin`` says of layer ``number``; None where there is no such layer."""
        layer = self._decoders[number][1]
        if layer is None or turns is None:
            return None
        held: Any = past.layers[layer.index]
        return layer.begin(x, turns, held)

    def _prepared(self, number: int, turns: Turns | None, past: DynamicCache) -> Call | None:
        layer = self._decoders[number][1] if number < len(self._decoders) else None
        if layer is None or turns is None:
            return None
        held: Any = past.layers[layer.index]
        return layer.prepared(turns, held)

    def _has_begun(self, number: int, routed: bool) -> None:
        layer, self._routed = self._decoders[number][1], routed
        assert layer is not None
        layer.begun += 1

    def _go_on(self, last: DecoderLayer, number: int, turns: Turns | None, past: DynamicCache) -> None:
        """What follows the experts of a layer: layer ``number`` up to its router, or what is after the last. Whoever is
        asked before attention must not be asked before all is said of the layer before; listeners are told in order."""
        if self.layers[0].signals.early:
            return
        if number < len(self._decoders):
            self._routed = self._begun(number, last.hidden_at, turns, past)
        else:
            self._logits = self._told(last.hidden)

    def _told(self, x: Tensor) -> Tensor:
        if self._native is not None:
            return self._clock.timed(self._native, x.contiguous())
        logits: Tensor = self._head.forward(self._norm.forward(x))
        return logits[0, -1]

    def _theirs(self, past: DynamicCache, position: int, decoder: nn.Module, x: Tensor) -> Tensor:
        """The layer ``decoder`` as the model's forward would call it, with a copy: what the next token overwrites is
        not for strangers."""
        given = {"position_ids": torch.tensor([[position]]), "position_embeddings": self._positions.at(position)}
        out: Tensor = decoder(x.clone(), attention_mask=None, past_key_values=past, use_cache=True, **given)
        return out


@dataclass(slots=True)
class _Next(Following):
    """What comes after the experts of ``last``: layer ``number``, or the head."""

    step: DecodeStep
    last: DecoderLayer
    number: int
    turns: Turns | None
    past: DynamicCache

    def __call__(self) -> None:
        self.step._go_on(self.last, self.number, self.turns, self.past)

    def prepared(self) -> Call | None:
        return self.step._prepared(self.number, self.turns, self.past)

    def begun(self, routed: bool) -> None:
        self.step._has_begun(self.number, routed)


@dataclass(frozen=True, slots=True)
class _Ahead:
    """What ``go_ahead`` was told, where ``past`` ended then, how often ``layer`` had begun, and what that said."""

    token: int
    past: Any
    position: int
    layer: Layer
    begun: int
    routed: bool


class _Embedding:
    """Rows of ``module``, which takes ten times as long."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._parameters = module, module._parameters
        plain = type(module) is nn.Embedding and module.max_norm is None
        self._plain = plain and "forward" not in vars(module) and "weight" in self._parameters

    def __call__(self, token: int) -> Tensor:
        """[1, 1, D]."""
        table = self._parameters.get("weight") if self._plain else None
        if table is not None:
            return table[token].view(1, 1, -1)
        row: Tensor = self._module(torch.tensor([[token]]))
        return row

    def place(self, token: int) -> int:
        """Where that lies in memory; 0 where it does not."""
        table = self._parameters.get("weight") if self._plain else None
        if table is None or table.dtype is not torch.bfloat16 or not table.is_contiguous():
            return 0
        if not 0 <= token < len(table):
            return 0
        return table.data_ptr() + 2 * table.shape[1] * token


def _is_plain(model: PreTrainedModel) -> bool:
    """Whether ``model`` has the usual parts, and attends to all that came before."""
    base, config = getattr(model, "model", None), model.config
    if not isinstance(base, nn.Module) or {name for name, _ in model.named_children()} != BASE:
        return False
    windows = any(getattr(config, name, None) is not None for name in ("sliding_window", "attention_chunk_size"))
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return {name for name, _ in base.named_children()} == PARTS and not windows and kinds == {"full_attention"}


@torch.inference_mode()
def _agrees(model: PreTrainedModel, step: DecodeStep, parts: Sequence[MoeAnatomy]) -> bool:
    """Whether ``step`` gives the logits of the model's own forward, and leaves the same in the cache."""

    def theirs(past: Any) -> Tensor:
        logits: Tensor = model(input_ids=torch.tensor([[TOKEN]]), past_key_values=past, use_cache=True).logits
        return logits[0, -1]

    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(standing_in(part.experts_module, TrialExperts(part.router)))
        wanted = _run(model, theirs)
        signals = step.layers[0].signals
        found = [_run(model, lambda past: step.logits(TOKEN, past)) for _ in signals.every_way()]
    for part in parts:
        part.pre_attention = part.residual = part.router_input = part.compiled = None
    return all(all(map(same, wanted, one)) for one in found)


def _run(model: PreTrainedModel, forward: Callable[[Any], Tensor]) -> list[Tensor]:
    """Logits [V] of ``forward`` with the cache of a prompt, and what it leaves there."""
    past: Any = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([PROMPT]), past_key_values=past, use_cache=True)
    make_room(past)
    with attention.decoding():
        logits = forward(past)
    return [logits.clone(), *(held for layer in past.layers for held in (layer.keys, layer.values))]
