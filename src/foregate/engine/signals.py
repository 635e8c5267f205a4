"""Signals read off a stock model by hooks: router inputs and residuals, and later routers applied to them.

What differs by family (which norm feeds the MoE block, what the router takes besides hidden states) is learned by
watching the first forward pass, not listed. Shapes: T tokens, E experts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from foregate.errors import ConfigError


@dataclass(slots=True)
class MoeAnatomy:
    """The parts of one MoE layer, and what flowed into them last."""

    experts: nn.Module
    block: nn.Module
    decoder: nn.Module
    router: nn.Module | None
    norm: nn.Module | None = None
    router_extra: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    router_input: Tensor | None = None
    residual: Tensor | None = None
    candidates: dict[int, tuple[nn.Module, Tensor]] = field(default_factory=dict)


def anatomy(model: nn.Module, experts_path: str) -> MoeAnatomy:
    """Parts around the expert module at ``experts_path``: the block that owns it and the decoder layer around that."""
    parts = experts_path.split(".")
    block = model.get_submodule(".".join(parts[:-1]))
    decoder = model.get_submodule(".".join(parts[: _layer_depth(model, parts)]))
    experts = model.get_submodule(experts_path)
    return MoeAnatomy(experts, block, decoder, _router(block, experts))


def _layer_depth(model: nn.Module, parts: list[str]) -> int:
    """Number of path parts up to the innermost numbered element of a module list."""
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return numbered[-1] + 1 if numbered else len(parts) - 1


def _router(block: nn.Module, experts: nn.Module) -> nn.Module | None:
    children = {name: child for name, child in block.named_children() if child is not experts}
    for name in ("router", "gate"):
        if name in children:
            return children[name]
    named = [child for child in children.values() if type(child).__name__.endswith(("Router", "Gate"))]
    return named[0] if named else None


class ModelSignals:
    """Implements ``interfaces.Signals`` over a live model. ``close`` removes every hook."""

    def __init__(self, model: nn.Module, experts_paths: tuple[str, ...], top_k: int, family: str) -> None:
        self.layer = 0
        self.layers = len(experts_paths)
        self.top_k = top_k
        self._family = family
        self._parts = [anatomy(model, path) for path in experts_paths]
        self._handles: list[Any] = []
        self._watching: list[Any] = []
        for part in self._parts:
            self._attach(part)

    def close(self) -> None:
        """Remove every hook; the model is as it was."""
        for handle in self._handles + self._watching:
            handle.remove()

    def reset(self) -> None:
        """Forget the tensors of the last pass."""
        for part in self._parts:
            part.router_input = part.residual = None

    def router_output(self, layer: int) -> Any:
        """Output of the router of ``layer``, recomputed from its last input."""
        part = self._parts[layer]
        assert part.router_input is not None
        return self._route(part, part.router_input)

    def supports(self, source: str) -> bool:
        """True if every layer has what ``source`` needs; known once one forward pass has run."""
        return all(p.router is not None and (source != "residual" or p.norm is not None) for p in self._parts)

    def rank(self, target: int, source: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See ``interfaces.Signals``. Uses the last token of the pass."""
        here, there = self._parts[self.layer], self._parts[target]
        value = here.residual if source == "residual" else here.router_input
        if value is None or there.router is None or (source == "residual" and there.norm is None):
            raise ConfigError(f"{self._family} gives no {source.replace('_', ' ')} signal at MoE layer {self.layer}")
        value = value[-1:]
        if source == "residual":
            assert there.norm is not None
            # .forward, not the call: hooks of ours and of tracers must not see a probe.
            value = there.norm.forward(value)
        return _ranking(self._route(there, value), there)

    def _route(self, part: MoeAnatomy, x: Tensor) -> Any:
        assert part.router is not None
        args, kwargs = part.router_extra
        return part.router.forward(x, *args, **kwargs)

    def _attach(self, part: MoeAnatomy) -> None:
        def block_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            part.router_input = x.reshape(-1, x.shape[-1])
            if part.norm is None:
                self._learn_norm(part, x)

        def router_call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            part.router_extra = (args[1:] if args else (), rest)

        self._handles.append(part.block.register_forward_pre_hook(block_input, with_kwargs=True))
        if part.router is not None:
            self._handles.append(part.router.register_forward_pre_hook(router_call, with_kwargs=True))
        for child in part.decoder.children():
            if child is not part.block:
                self._watching.append(child.register_forward_hook(_watch(part), with_kwargs=True))

    def _learn_norm(self, part: MoeAnatomy, x: Tensor) -> None:
        """The norm is the sibling whose output *is* the tensor that entered the block."""
        found = part.candidates.get(x.data_ptr())
        part.candidates.clear()
        if found is None:
            return
        part.norm, residual = found
        part.residual = residual.reshape(-1, residual.shape[-1])

        def norm_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            r = args[0] if args else kwargs["hidden_states"]
            part.residual = r.reshape(-1, r.shape[-1])

        self._handles.append(part.norm.register_forward_pre_hook(norm_input, with_kwargs=True))

    def stop_learning(self) -> None:
        """After the first pass: the watching hooks have told what they could."""
        for handle in self._watching:
            handle.remove()
        self._watching.clear()
        for part in self._parts:
            part.candidates.clear()


def _watch(part: MoeAnatomy) -> Any:
    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        source = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(output, Tensor) and isinstance(source, Tensor) and source.shape == output.shape:
            # The last writer of an address wins: memory is reused within a layer.
            part.candidates[output.data_ptr()] = (module, source)

    return after


def _ranking(output: Any, part: MoeAnatomy) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Best-first experts of a router's output, whatever its form: the chosen first, the rest by their logits."""
    tensors = [t for t in (output if isinstance(output, (tuple, list)) else (output,)) if isinstance(t, Tensor)]
    chosen = [t for t in tensors if not t.is_floating_point()]
    scored = [t for t in tensors if t.is_floating_point()]
    logits = max(reversed(scored), key=lambda t: t.shape[-1])[-1].float()
    scores = logits.numpy()
    order = np.argsort(-scores, kind="stable")
    if chosen:
        first = chosen[-1][-1].numpy().astype(np.int64)
        order = np.concatenate([first, order[~np.isin(order, first)]])
    return order.astype(np.int64), scores[order].astype(np.float32)
