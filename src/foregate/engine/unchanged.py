"""Whether the modules that a kernel stands in for are still what they were when it was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module


class Unchanged:
    """Whether ``modules`` are what they were: no hook on them but so many in ``own``, no other forward, no other child
    (nor of ``parents``). A class whose forward is replaced is not seen."""

    def __init__(
        self, modules: Sequence[nn.Module], own: Sequence[dict[int, Any]] = (), parents: Sequence[nn.Module] = ()
    ) -> None:
        kept = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        kept += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        ours = {id(hooks) for hooks in own}
        self._own = [hooks for hooks in kept if id(hooks) in ours]
        self._others = [hooks for hooks in kept if id(hooks) not in ours]
        self._forwards = [(vars(module), vars(module).get("forward")) for module in modules]
        owners = [module for module in (*parents, *modules) if module._modules]
        self._children = [(module._modules, dict(module._modules)) for module in owners]

    def __call__(self, own: int = 0) -> bool:
        if any(self._others) or sum(map(len, self._own)) != own:
            return False
        for attributes, forward in self._forwards:
            if attributes.get("forward") is not forward:
                return False
        return all(now == before for now, before in self._children)
