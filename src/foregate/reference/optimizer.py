"""bf16 compute parameters over flat fp32 master copies, and the AdamW step between them.

Shapes: P parameters of the model, in one flat buffer: matrices first (decayed), then norms (not decayed).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foregate.reference.model import ModelConfig, Weights, gather, initial, shapes


class MixedPrecisionAdamW:
    """Owns the parameters. `weights` are leaf tensors; after `backward`, `step` updates them."""

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        betas: tuple[float, float],
        weight_decay: float,
        clip: float,
        compute: torch.dtype = torch.bfloat16,
    ) -> None:
        named_shapes = shapes(config)
        names = sorted(named_shapes, key=lambda name: len(named_shapes[name]) == 1)  # stable: matrices, then norms
        sizes = [torch.Size(named_shapes[name]).numel() for name in names]
        matrices = sum(size for name, size in zip(names, sizes, strict=True) if len(named_shapes[name]) > 1)
        total = sum(sizes)
        self.clip = clip
        self._master = torch.empty(total)
        self._grad = torch.zeros(total)
        self._compute = torch.empty(total, dtype=compute)
        self._parts: list[Tensor] = []  # the two leaf tensors of AdamW, views of the master copy
        for part in (slice(0, matrices), slice(matrices, total)):
            leaf = self._master[part].requires_grad_()
            leaf.grad = self._grad[part]
            self._parts.append(leaf)
        self._adamw = torch.optim.AdamW(
            [
                {"params": [self._parts[0]], "weight_decay": weight_decay},
                {"params": [self._parts[1]], "weight_decay": 0.0},
            ],
            betas=betas,
            eps=1e-10,
            fused=True,
        )
        self.masters = self._views(self._master, names, sizes, named_shapes)
        self._grads = self._views(self._grad, names, sizes, named_shapes)
        self.named = {
            name: view.requires_grad_() for name, view in self._views(self._compute, names, sizes, named_shapes).items()
        }
        self.weights: Weights = gather(config, self.named)
        self.load_parameters(dict(initial(config, seed)))

    @staticmethod
    def _views(
        flat: Tensor, names: list[str], sizes: list[int], named_shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        pieces = torch.split(flat.detach(), sizes)
        return {name: piece.view(named_shapes[name]) for name, piece in zip(names, pieces, strict=True)}

    @torch.no_grad()
    def load_parameters(self, named: dict[str, Tensor]) -> None:
        """Set master and compute parameters; the moments stay as they are."""
        for name, master in self.masters.items():
            master.copy_(named[name])
        self._compute.copy_(self._master)

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        """One clipped AdamW step from the leaves' gradients, which it consumes. Returns the norm before clipping."""
        names = list(self.named)
        torch._foreach_copy_([self._grads[name] for name in names], [self._taken(name) for name in names])
        norm = float(self._grad.norm())
        if norm > self.clip:
            self._grad.mul_(self.clip / norm)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._compute.copy_(self._master)
        return norm

    def _taken(self, name: str) -> Tensor:
        leaf = self.named[name]
        grad = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        leaf.grad = None
        return grad

    def state(self) -> dict[str, Any]:
        """Everything that a bit-for-bit continuation needs."""
        return {"master": self._master.detach(), "adamw": self._adamw.state_dict()["state"]}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._master.copy_(state["master"])
        self._compute.copy_(self._master)
        groups = self._adamw.state_dict()["param_groups"]
        self._adamw.load_state_dict({"state": state["adamw"], "param_groups": groups})
