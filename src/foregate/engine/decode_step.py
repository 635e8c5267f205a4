"""A decode step without the forward of transformers' model around its layers: embedding, layers, norm, head.

That forward makes a mask of nothing, positions, and keyword arguments for every layer: 0.8 ms a token. Taken where
layers are of ``engine/decoder_layer.py`` (others are called as they are) and a trial gives the bits of that forward;
what is unusual at a call (a hook of a stranger) goes on to it.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from foregate.checkpoint.anatomy import MoeAnatomy
from foregate.engine import attention
from foregate.engine.attention_block import same
from foregate.engine.decoder_layer import DecoderLayers, TrialExperts, agreed
from foregate.engine.kv_room import RoomyLayer, make_room
from foregate.engine.runtime import in_interface, standing_in
from foregate.engine.unchanged import Unchanged
from foregate.native.decoder_layer import turned

BASE, PARTS = {"model", "lm_head"}, {"embed_tokens", "layers", "norm", "rotary_emb"}
"""Children of a model, and of what is inside it."""

PROMPT, TOKEN = (1, 2), 0
"""Of a trial."""


class DecodeStep:
    """Steps of ``model``, whose MoE layers are ``parts``, by its ``layers``. ``ready``: whether it can be at all."""

    def __init__(self, model: PreTrainedModel, layers: DecoderLayers, parts: Sequence[MoeAnatomy]) -> None:
        self.layers, self.ready = layers.layers, False
        if not _is_plain(model):
            return
        base: Any = model.model
        blocks = {(block.inputs, block.width) for block in (layer.kernel.attention for layer in self.layers)}
        if len(blocks) != 1 or not all(in_interface(part.experts_module) for part in parts):
            return
        ours = {layer.part.decoder: layer for layer in self.layers}
        self._decoders = [(decoder, ours.get(decoder)) for decoder in base.layers]
        self._embed, self._norm, self._rotary, self._head = base.embed_tokens, base.norm, base.rotary_emb, model.lm_head
        around = [model, base, self._embed, self._norm, self._rotary, self._head, base.layers, *base.layers]
        self._around = Unchanged(around)
        self.ready = agreed(lambda: _agrees(model, self, parts))

    def close(self) -> None:
        """From now on the model's own forward."""
        self.ready = False

    def __call__(self, token: int, past: Any) -> Tensor | None:
        """Logits [V] after ``token``, which ``past`` then holds; None, and nothing done, where something is unusual."""
        if not self.ready or not self.layers or not self._around() or not attention.is_on():
            return None
        if type(past) is not DynamicCache or {type(held) for held in past.layers} != {RoomyLayer}:
            return None
        return self.logits(token, past) if all(layer.alone() for layer in self.layers) else None

    def logits(self, token: int, past: DynamicCache) -> Tensor:
        """As a call, without most of its questions."""
        x, position = self._embed(torch.tensor([[token]])), torch.tensor([[past.get_seq_length()]])
        cos, sin = pair = self._rotary(x, position_ids=position)
        given = {"position_ids": position, "position_embeddings": pair, "past_key_values": past, "use_cache": True}
        turns = turned(cos, sin) if self.layers[0].kernel.attention.takes(x, cos, sin) else None
        for decoder, layer in self._decoders:
            held: Any = past.layers[layer.index] if layer is not None else None
            out = None if layer is None or turns is None else layer.one(x, turns, held)
            # A copy: what the next token overwrites is not for strangers.
            x = decoder(x.clone(), attention_mask=None, **given) if out is None else out
        logits: Tensor = self._head(self._norm(x))
        return logits[0, -1]


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
    return [logits, *(held for layer in past.layers for held in (layer.keys, layer.values))]
