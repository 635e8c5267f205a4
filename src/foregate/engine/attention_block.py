"""Self-attention of a decode step in one compiled call, or two: everything before the cache, and everything after it.

transformers spends 20 calls of torch and some 200 of Python a layer on what the kernels do in one. Which modules are
taken is decided when the model is built: by their parts, and then by trial, as the bits must be those of the module's
own forward (with the kernels of ``engine/dense.py``). Everything unusual at a call goes on to that forward.
Shapes: D hidden, H heads, G key/value heads, W width of a head, R values of a head that are turned by position.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from foregate.checkpoint.dense_int8 import Int8Linear
from foregate.engine import attention, norms
from foregate.engine.clock import Clock
from foregate.engine.kv_room import RoomyLayer
from foregate.engine.unchanged import Unchanged
from foregate.native import kernels
from foregate.native.attention_block import AttentionBlock, Heads

PROJECTIONS, NORMS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_norm", "k_norm")

CACHES = {DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer}
"""Layers of a cache that give back all that is to be attended to, in the dtype that they were given."""

_KNOWN = {"hidden_states", "position_embeddings", "past_key_values"}

TRIALS = ((6, 1.0), (100_003, 30.0))
"""Positions and sizes of the inputs on which a module must agree: some families scale or clip where these are large."""

Forward = Callable[..., tuple[Tensor, Tensor | None]]


def forwards(model: nn.Module, native: Collection[nn.Module], clock: Clock) -> Iterator[tuple[nn.Module, Forward]]:
    """Attention modules of ``model`` and the forward that each is to have. ``native``: what has a kernel's already.
    ``clock`` times their products."""
    rotary = next(filter(is_rotary, model.modules()), None)
    if rotary is None or kernels.library() is None:
        return
    for module in model.modules():
        heads = _heads(module, native)
        if heads is not None:
            block = _block(module, heads)
            forward = _forward(module, block, clock)
            if _agrees(module, forward, block, rotary):
                yield module, forward


def is_rotary(module: nn.Module) -> bool:
    """Whether ``module`` gives cosines and sines for positions, the same for all layers."""
    named = type(module).__name__.endswith("RotaryEmbedding")
    return named and list(inspect.signature(module.forward).parameters) == ["x", "position_ids"]


# What a module consists of


def _heads(module: nn.Module, native: Collection[nn.Module]) -> Heads | None:
    """The heads of ``module`` if it has the parts of a standard attention, each computed by a kernel; else None."""
    parts = dict(module.named_children())
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if own or set(parts) not in ({*PROJECTIONS}, {*PROJECTIONS, *NORMS}) or not _is_called_as_usual(module):
        return None
    if not all(part in native or (name in PROJECTIONS and _is_int8(part)) for name, part in parts.items()):
        return None
    return None if _clips(module) else _divided(module, parts)


def _is_called_as_usual(module: nn.Module) -> bool:
    taken = inspect.signature(module.forward).parameters
    needed = {name for name, one in taken.items() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD}
    anything = any(one.kind is one.VAR_KEYWORD for one in taken.values())
    known = {*_KNOWN, "attention_mask"}
    return anything and needed <= known <= set(taken) and isinstance(getattr(module, "layer_idx", None), int)


def _is_int8(part: nn.Module) -> bool:
    return isinstance(part, Int8Linear) and part.weight.device.type == "cpu" and part.weight.is_contiguous()


def _clips(module: nn.Module) -> bool:
    """OLMoE's option, which a trial sees only where values are that large."""
    return getattr(getattr(module, "config", None), "clip_qkv", None) is not None


def _divided(module: nn.Module, parts: dict[str, nn.Module]) -> Heads | None:
    width, scale = getattr(module, "head_dim", None), getattr(module, "scaling", None)
    if not isinstance(width, int) or not isinstance(scale, float) or width % 16:
        return None
    q, k, v, o = (_weight(parts[name]) for name in PROJECTIONS)
    rows, shared_rows = len(q), len(k)
    heads, shared = rows // width, shared_rows // width
    whole = heads * width == rows and shared * width == shared_rows and shared > 0 and heads % shared == 0
    fits = k.shape == v.shape and q.shape[1] == k.shape[1] and o.shape[1] == rows and q.dtype is k.dtype is v.dtype
    plain = all(_is_bf16(parts[name].bias) for name in PROJECTIONS)
    for name, values in zip(NORMS, (rows, shared_rows), strict=True):
        plain = plain and (name not in parts or len(_weight(parts[name])) in (width, values))
    return Heads(heads, shared, width, scale) if whole and fits and plain and _narrow(heads, shared, width) else None


def _is_bf16(bias: Any) -> bool:
    return bias is None or (bias.dtype is torch.bfloat16 and bias.device.type == "cpu" and bias.is_contiguous())


def _narrow(heads: int, shared: int, width: int) -> bool:
    """Whether the kernels attend to such heads, and torch's norms would be theirs."""
    key = torch.empty(1, shared, 1, width, dtype=torch.bfloat16)
    return heads * width <= norms.NORM_VALUES and kernels.attends(key.new_empty(1, heads, 1, width), key, key)


def layer_of(module: nn.Module) -> int:
    """Of a cache, which the attention ``module`` writes to."""
    index = module.layer_idx
    assert isinstance(index, int)
    return index


def _weight(part: nn.Module) -> Tensor:
    weight = part.weight
    assert isinstance(weight, Tensor)
    return weight


def _block(module: nn.Module, heads: Heads) -> AttentionBlock:
    parts = dict(module.named_children())
    projections = [parts[name] for name in PROJECTIONS]
    matrices = [kernels.matrix(_weight(part), getattr(part, "weight_scale", None)) for part in projections]
    found = [norms.native_norm(parts[name]) if name in parts else None for name in NORMS]
    return AttentionBlock(heads, matrices, [getattr(part, "bias", None) for part in projections], found)


# What takes the place of a module's forward


def _forward(module: nn.Module, block: AttentionBlock, clock: Clock) -> Forward:
    theirs, layer, parts = module.forward, layer_of(module), Unchanged(list(module.children()), parents=[module])

    def forward(*args: Any, **kwargs: Any) -> Any:
        past = kwargs.get("past_key_values")
        alone = attention.is_on() and not args and parts()
        if not alone or "hidden_states" not in kwargs or not is_usual(kwargs) or not _gives_all(past, layer, block):
            return theirs(*args, **kwargs)
        x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        if not block.takes(x, cos, sin):
            return theirs(*args, **kwargs)
        if past is not None and type(past.layers[layer]) is RoomyLayer:
            held = past.layers[layer]
            place = held.place(block.shared, block.width)
            if place is None:
                return theirs(*args, **kwargs)
            out = clock.timed(block.attention, x, cos, sin, place)
            held.grow()
            return out, None
        query, key, value = clock.timed(block.qkv, x, cos, sin)
        if past is not None:
            key, value = past.update(key, value, layer)
        return clock.timed(block.attend, query, key, value), None

    vars(forward)["native"] = block
    return forward


def native_block(module: nn.Module) -> AttentionBlock | None:
    """The kernels' attention of a module that is computed by them now; None for any other."""
    return getattr(module.forward, "native", None)


def is_usual(kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for plain attention, without a mask, by cosines and sines."""
    turns = kwargs.get("position_embeddings")
    return isinstance(turns, tuple) and len(turns) == 2 and attention.is_plain(kwargs, _KNOWN)


def _gives_all(past: Any, layer: int, block: AttentionBlock) -> bool:
    """Whether ``past`` gives attention what it was given before and now, and nothing else."""
    if past is None:
        return True
    if type(past) is not DynamicCache or layer >= len(past.layers) or type(past.layers[layer]) not in CACHES:
        return False
    held: Any = past.layers[layer]
    return held.keys is None or held.keys.dim() < 4 or _alike(held.keys, held.values, block)


def _alike(keys: Tensor, values: Tensor, block: AttentionBlock) -> bool:
    form = (keys.shape[0], keys.shape[1], keys.shape[3])
    same = keys.dtype is values.dtype is torch.bfloat16 and keys.shape == values.shape
    return same and form == (1, block.shared, block.width)


# Trial


@torch.inference_mode()
def _agrees(module: nn.Module, forward: Forward, block: AttentionBlock, rotary: nn.Module) -> bool:
    """Whether ``forward`` gives the bits of ``module``'s own, with a cache and without."""
    with attention.decoding():
        for position, size in TRIALS:
            given, kept = token_at(position, size, block.inputs, rotary), cached(block.shared, block.width, position)
            for past in (None, kept):
                theirs, ours = (_run(each, layer_of(module), given, past) for each in (module.forward, forward))
                if len(theirs) != len(ours) or not all(map(same, theirs, ours)):
                    return False
    return True


def token_at(position: int, size: float, width: int, rotary: nn.Module) -> dict[str, Any]:
    """Arguments for a random token at ``position``. Some rotary embeddings remember the largest they were asked."""
    x, ids = _random(position, 1, 1, width) * size, torch.tensor([[position]])
    given = {"hidden_states": x, "attention_mask": None, "position_ids": ids, "use_cache": True}
    return {**given, "position_embeddings": rotary(x, ids % 10)}


def cached(shared: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random keys and values of five positions."""
    shape = (1, shared, 5, width)
    return _random(seed + 1, *shape), _random(seed + 2, *shape)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def _run(forward: Forward, layer: int, given: dict[str, Any], held: tuple[Tensor, Tensor] | None) -> list[Any]:
    """What ``forward`` returns for ``given``, and what it leaves in a cache that had ``held``."""
    if held is None:
        return list(forward(**given, past_key_values=None))
    past = DynamicCache()
    past.update(*held, layer)
    returned = forward(**given, past_key_values=past)
    kept = past.layers[layer]
    assert isinstance(kept, DynamicLayer)
    return [*returned, kept.keys, kept.values]


def same(one: Any, other: Any) -> bool:
    """Whether both are the same object, or tensors of one dtype and the same numbers."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other
    return one.dtype is other.dtype and torch.equal(one, other)
