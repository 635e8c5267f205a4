"""Where transformers is told to call our experts instead of its own, and no longer to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from foregate.engine.runtime import ExpertRuntime

IMPLEMENTATION = "foregate"
"""Name under which the function is registered in transformers' ExpertsInterface."""

T = TypeVar("T")


def install(runtime: ExpertRuntime, modules: Sequence[nn.Module]) -> None:
    """Point every expert module at ``runtime``, through transformers' own interface where the family uses it."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_function)
    for layer, module in enumerate(modules):
        module._foregate = (runtime, layer)  # type: ignore[assignment]
        if in_interface(module):
            module.config._experts_implementation = IMPLEMENTATION  # type: ignore[union-attr]
        else:
            _install_scaled(runtime, layer, module)


@contextmanager
def standing_in(module: nn.Module, experts: T) -> Iterator[T]:
    """``experts``, with the ``forward`` of a runtime, computes for ``module``, one of transformers' interface."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_function)
    config: Any = module.config
    before = config._experts_implementation
    config._experts_implementation = IMPLEMENTATION
    module._foregate = (experts, 0)  # type: ignore[assignment]
    try:
        yield experts
    finally:
        config._experts_implementation = before
        uninstall([module])


def in_interface(module: nn.Module) -> bool:
    """Whether transformers calls what is registered in place of ``module``."""
    return hasattr(module, "_is_expert_parallel")


def uninstall(modules: Sequence[nn.Module]) -> None:
    """Take ``runtime`` off the modules again: the model does not keep an engine's pool alive."""
    for module in modules:
        module.__dict__.pop("_foregate", None)
        module.__dict__.pop("forward", None)


def _experts_function(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    runtime, layer = self._foregate
    result: Tensor = runtime.forward(layer, self, hidden_states, top_k_index, top_k_weights)
    return result


def _install_scaled(runtime: ExpertRuntime, layer: int, module: Any) -> None:
    """Llama 4 is outside the interface: give the instance the flags of its layout and a forward of ours."""

    def apply_gate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gated: Tensor = up * module.act_fn(gate)
        return gated

    module.is_transposed, module._apply_gate = True, apply_gate
    module.forward = lambda hidden_states: runtime.forward_scaled(layer, module, hidden_states)
