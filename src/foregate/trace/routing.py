"""Where a live transformers model routes: its MoE layers, and what reaches their experts.

Shapes: T tokens, k experts chosen, E experts of a layer, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foregate.checkpoint.skeleton import DISPATCHED_FLAGS, EXTRA_CLASSES
from foregate.errors import TraceError

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One MoE layer: the experts module at ``path``, in decoder layer ``decoder_layer``."""

    path: str
    module: nn.Module
    decoder_layer: int
    experts: int

    @property
    def scaled(self) -> bool:
        """Llama 4's form: the experts get every token once per expert, scaled, and no choice."""
        return type(self.module).__name__ in EXTRA_CLASSES


def moe_layers(model: nn.Module, paths: Sequence[str] = (), experts: Sequence[int] = ()) -> list[MoeLayer]:
    """MoE layers of ``model`` in execution order; with ``paths`` and ``experts`` (E of each), exactly those.

    Raises TraceError where there is none that this can follow.
    """
    if paths:
        return [_layer(path, model.get_submodule(path), count) for path, count in zip(paths, experts, strict=True)]
    found = [_layer(path, module, _count(module)) for path, module in model.named_modules() if _routed(module)]
    if not found:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        message = f"model type {kind!r} has no experts that transformers dispatches through its experts interface"
        raise TraceError(f"{message}, so there is no routing to trace")
    return sorted(found, key=lambda layer: layer.decoder_layer)


def chosen(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """``top_k_index`` and ``top_k_weights``, both [T, k], among the arguments of an experts module."""
    given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
    return given["top_k_index"], given["top_k_weights"]


def chosen_scaled(output: tuple[Tensor, Tensor], top_k: int) -> tuple[Tensor, Tensor]:
    """The same from the output of Llama 4's router (scores, logits), both [T, E], with the topk that it has run."""
    scores, logits = output
    index = logits.topk(top_k, dim=1).indices
    return index, scores.gather(1, index)


def router_scores(output: Any, scaled: bool) -> Tensor | None:
    """Scores of all experts [T, at least E] in the output of a router module; None where there are none.

    Routers of the interface families give them first; Llama 4 gives them after the scores of the chosen.
    """
    value = output[1 if scaled else 0] if isinstance(output, (tuple, list)) else output
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among the arguments of a call."""
    value = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    return value if isinstance(value, Tensor) else None


def _routed(module: nn.Module) -> bool:
    return all(flag in vars(module) for flag in DISPATCHED_FLAGS) or type(module).__name__ in EXTRA_CLASSES


def _layer(path: str, module: nn.Module, experts: int) -> MoeLayer:
    number = _NUMBER.search(path)
    return MoeLayer(path, module, int(number.group(1)) if number else 0, experts)


def _count(module: nn.Module) -> int:
    """E, from the parameters: configs count experts that have no weights too."""
    return next(int(parameter.shape[0]) for parameter in module.parameters(recurse=False) if parameter.ndim >= 2)
