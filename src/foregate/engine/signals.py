"""Later routers asked ahead, on what this layer knows. Believed only where replaying a router gives what it chose.

Shapes: T tokens, E experts, k chosen, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from foregate.checkpoint.anatomy import FlowWatcher, MoeAnatomy
from foregate.errors import ConfigError
from foregate.types import RoutingStep

Ranking = tuple[NDArray[np.int64], NDArray[np.float32]]


class ModelSignals:
    """Implements ``interfaces.Signals`` over a live model. ``close`` removes every hook.

    ``distrust`` is empty, or says why routers of this model cannot be asked ahead.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], experts: Sequence[int], top_k: int, family: str) -> None:
        self.layer = 0
        self.layers = len(paths)
        self.top_k = top_k
        self.distrust = ""
        self._family = family
        self._flow = FlowWatcher(model, paths, experts)

    def close(self) -> None:
        """Remove every hook; the model is as it was."""
        self._flow.close()

    def rank(self, target: int, source: str) -> Ranking:
        """See ``interfaces.Signals``; of the last token of the pass."""
        if self.distrust:
            raise ConfigError(self.distrust)
        here, there = self._flow.parts[self.layer], self._flow.parts[target]
        value = here.router_input
        if source == "residual" and here.residual is not None and there.norm is not None:
            # .forward, not the call: hooks of ours and of tracers must not see a probe.
            value = there.norm.forward(here.residual[-1:])
        if value is None:
            raise ConfigError(f"{self._family}: MoE layer {self.layer} has not run yet")
        return _ranking(_route(there, value[-1:]), there.experts)

    def router_output(self, layer: int) -> Any:
        """Output of the router of ``layer`` for all tokens, recomputed from its last input."""
        part = self._flow.parts[layer]
        assert part.router_input is not None
        return _route(part, part.router_input)

    def on_route(self, step: RoutingStep) -> None:
        """In the first pass: check that a replayed router chooses what the model chose."""
        if self._flow.learning and not self.distrust:
            self.distrust = self._mismatch(step)

    def stop_learning(self) -> None:
        """After the first pass."""
        if self._flow.learning:
            self._flow.stop_learning()

    def _mismatch(self, step: RoutingStep) -> str:
        part = self._flow.parts[step.layer]
        place = f"{self._family}: MoE layer {step.layer}"
        if part.router is None or part.router_input is None:
            return f"{place} has no router module that can be asked ahead"
        try:
            ranked, _ = _ranking(_route(part, part.router_input[-1:]), part.experts)
        except Exception as error:  # a stranger's module, called in a way that it may not foresee
            return f"{place}: its router cannot be asked ahead ({type(error).__name__}: {error})"
        chosen = {e for e in step.experts[-1].tolist() if 0 <= e < part.experts}
        return (
            "" if chosen == set(ranked[: len(chosen)].tolist()) else f"{place}: its router does not repeat its choice"
        )


def _route(part: MoeAnatomy, x: Tensor) -> Any:
    assert part.router is not None
    args, kwargs = part.router_extra
    return part.router.forward(x.view((1,) * (part.router_dim - 2) + x.shape), *args, **kwargs)


def _ranking(output: Any, experts: int) -> Ranking:
    """Best-first experts of a router's output, whatever its form: the chosen first, the rest by their logits."""
    tensors = [t for t in (output if isinstance(output, (tuple, list)) else (output,)) if isinstance(t, Tensor)]
    chosen = [t for t in tensors if not t.is_floating_point()]
    scored = [t for t in tensors if t.is_floating_point() and t.shape[-1] >= experts]
    # Llama 4 returns scores (zero where not chosen) before logits: the last is the one that ranks them all.
    scores = scored[-1].reshape(-1, scored[-1].shape[-1])[-1].float().numpy()[:experts]
    order = np.argsort(-scores, kind="stable")
    if chosen:
        first = chosen[-1].reshape(-1, chosen[-1].shape[-1])[-1].numpy()
        first = first[(first >= 0) & (first < experts)]
        others = np.ones(experts, dtype=bool)
        others[first] = False
        order = np.concatenate([first, order[others[order]]])
    return order.astype(np.int64), scores[order].astype(np.float32)
