"""The parts around each MoE layer of a live transformers model, and what flows into its router.

What differs by family (which norm feeds the router, what the router takes besides hidden states) is learned by watching
the first forward pass, not listed. Shapes: T tokens, E experts, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from foregate.types import Moment

_MIXER = re.compile(r"Attention|Mamba|DeltaNet|ShortConv|Mixer")
_NO_MIXER = re.compile(r"Norm|Residual|HyperConnection")


@dataclass(slots=True)
class MoeAnatomy:
    """The parts of one MoE layer. Tensors are of the last pass: ``pre_attention`` (input of ``mixer``), ``residual``
    (after attention) and ``router_input``, all [T, D].

    ``mixer`` is the attention, or what stands in for it in a hybrid; None where the layer has none. ``norm`` feeds the
    router and ``residual`` is its input (both None where the router reads the residual itself).
    """

    experts_module: nn.Module
    block: nn.Module
    decoder: nn.Module
    router: nn.Module | None
    experts: int
    mixer: nn.Module | None = None
    norm: nn.Module | None = None
    pre_attention: Tensor | None = None
    router_input: Tensor | None = None
    router_dim: int = 2
    router_extra: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    residual: Tensor | None = None
    compiled: Any = None
    """The ``native.decoder_layer`` in whose memory these tensors lie, if they do in one."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)


def anatomy(model: nn.Module, experts_path: str, experts: int) -> MoeAnatomy:
    """Parts around the expert module at ``experts_path``: the block that owns it and the decoder layer around that."""
    parts = experts_path.split(".")
    block = model.get_submodule(".".join(parts[:-1]))
    decoder = model.get_submodule(".".join(parts[: _layer_depth(parts)]))
    return MoeAnatomy(
        model.get_submodule(experts_path), block, decoder, _router(block), experts, find_mixer(decoder, block)
    )


def find_mixer(decoder: nn.Module, block: nn.Module) -> nn.Module | None:
    """The attention of a decoder layer, or what stands in for it in a hybrid; None where the layer has none."""
    return next((child for child in decoder.children() if child is not block and is_mixer(child)), None)


def is_mixer(module: nn.Module) -> bool:
    """Whether ``module`` is an attention or what stands in for one, by the name of its class."""
    name = type(module).__name__
    return bool(_MIXER.search(name)) and not _NO_MIXER.search(name)


def _layer_depth(parts: list[str]) -> int:
    """Number of path parts up to the innermost numbered element of a module list."""
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return numbered[-1] + 1 if numbered else len(parts) - 1


def _router(block: nn.Module) -> nn.Module | None:
    children = dict(block.named_children())
    for name in ("router", "gate"):
        if name in children:
            return children[name]
    return next((child for child in children.values() if type(child).__name__.endswith(("Router", "Gate"))), None)


class FlowWatcher:
    """Hooks that keep ``parts`` up to date with every pass. ``close`` removes them all; nothing else is touched.

    ``learning`` is True until ``stop_learning``, to be called after the first pass. ``reached(layer, moment)`` is
    called where a pass comes before the mixer and before the router of a MoE layer, with its parts up to date.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        experts: Sequence[int],
        reached: Callable[[int, Moment], None] = lambda layer, moment: None,
    ) -> None:
        self.parts = [anatomy(model, path, count) for path, count in zip(paths, experts, strict=True)]
        self.learning = True
        self._reached = reached
        self._handles: list[Any] = []
        self._watching: list[Any] = []
        for layer, part in enumerate(self.parts):
            self._attach(layer, part)

    def hooks(self, layer: int) -> int:
        """How many hooks on parts of ``layer`` stay when nothing is learned any more."""
        part = self.parts[layer]
        return 1 + (part.mixer is not None) + (part.norm is not None)

    def stop_learning(self) -> None:
        """The first pass has told what it could: take the extra hooks off."""
        self.learning = False
        for handle in self._watching:
            handle.remove()
        self._watching.clear()
        for part in self.parts:
            part.seen.clear()

    def close(self) -> None:
        """Remove every hook; the model is as it was."""
        self.stop_learning()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _attach(self, layer: int, part: MoeAnatomy) -> None:
        entry = part.router if part.router is not None else part.block
        self._handles.append(entry.register_forward_pre_hook(self._router_hook(layer, part), with_kwargs=True))
        if part.mixer is not None:
            self._handles.append(part.mixer.register_forward_pre_hook(self._mixer_hook(layer, part), with_kwargs=True))
        for child in part.decoder.children():
            if child not in (part.block, part.router):
                self._watching.append(child.register_forward_hook(_output_hook(part), with_kwargs=True))

    def _mixer_hook(self, layer: int, part: MoeAnatomy) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = _first(args, kwargs)
            part.pre_attention, part.compiled = None if value is None else _rows(value), None
            self._reached(layer, Moment.BEFORE_ATTENTION)

        return before

    def _router_hook(self, layer: int, part: MoeAnatomy) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _first(args, kwargs)
            assert x is not None
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            part.router_input, part.router_dim, part.compiled = _rows(x), x.dim(), None
            part.router_extra = (args[1:], rest)
            if self.learning:
                self._learn_norm(part, x)
            self._reached(layer, Moment.AFTER_ATTENTION)

        return before

    def _learn_norm(self, part: MoeAnatomy, x: Tensor) -> None:
        """The norm is the sibling whose output *is* the tensor that reached the router."""
        found = [(module, source) for module, source, output in part.seen if output.data_ptr() == x.data_ptr()]
        part.seen.clear()
        if not found or part.norm is not None:
            return
        part.norm, residual = found[-1]
        part.residual = _rows(residual)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = _first(args, kwargs)
            part.residual, part.compiled = None if value is None else _rows(value), None

        self._handles.append(part.norm.register_forward_pre_hook(before, with_kwargs=True))


def _output_hook(part: MoeAnatomy) -> Callable[..., None]:
    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        source = _first(args, kwargs)
        if isinstance(output, Tensor) and source is not None and source.shape == output.shape:
            # Keeping the output alive keeps its address unique: no later tensor can be taken for it.
            part.seen.append((module, source, output))

    return after


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among the arguments of a call."""
    value = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    return value if isinstance(value, Tensor) else None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
