"""What a learned method is to the training loop: a module that scores the experts of layers ahead.

Shapes: B tokens, L layers, H hops, E experts of the widest layer, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from foregate.training.trainer import Options
from foregate.training.view import Targets, View


@dataclass(frozen=True)
class LearnOptions(Options):
    """Options of every method that is trained by gradients. ``batch`` and ``block`` are tokens (of L layers each).

    ``precision`` is that of matrix products while training (sums and weights stay float32): ``auto`` is bfloat16 where
    the processor has instructions for it.
    """

    epochs: int = 6
    patience: int = 2
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    batch: int = 256
    block: int = 2048
    precision: str = field(default="auto", metadata={"choices": ("auto", "float32", "bfloat16")})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "patience", "batch", "block"):
            self.at_least(name, 1)
        for name in ("learning_rate", "weight_decay"):
            self.at_least(name, 0)

    @property
    def halves(self) -> bool:
        """Whether training multiplies in bfloat16."""
        if self.precision == "auto":
            return bool(torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported())
        return self.precision == "bfloat16"


class Learner(nn.Module):
    """Base of every learned method: binary cross-entropy on what was chosen, over all layers at once."""

    hops: tuple[int, ...]
    mask: Tensor
    """Buffer [L, H, E] or like it that is added to scores: see ``experts_mask``."""
    features: tuple[str, ...] = ()
    cache_share: float | None = None
    """Share of experts of the cache whose misses the loss counts; None where it counts none."""
    objective = "recall_at_k"
    """The validation metric that early stopping watches; larger is better, but of ``loss``."""
    replays = False
    """Whether it looks at ``View.policy`` and ``Targets.again``."""
    in_order = False
    """Whether a batch must be a whole block, token after token."""

    def choose_layers(self, layers: int, generator: torch.Generator) -> Tensor:
        """Layers that one training step looks at."""
        return torch.arange(layers)

    def scores(self, view: View, layers: Tensor) -> Tensor:
        """Logits [B, len(layers), H, E]."""
        raise NotImplementedError

    def loss(self, scores: Tensor, targets: Targets) -> Tensor:
        """Mean over what is known."""
        losses = functional.binary_cross_entropy_with_logits(scores, targets.chosen, reduction="none").mean(-1)
        return mean_known(losses, targets)

    def known(self, targets: Targets) -> int:
        """What ``loss`` is a mean over: how much it counts in a mean of such means."""
        return len(targets.chosen)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What serving needs."""
        return {name.replace(".", "_"): array(value) for name, value in self.named_parameters()}

    def settings(self) -> Mapping[str, Any]:
        """What serving needs beside the arrays: JSON values."""
        return {}


def mean_known(losses: Tensor, targets: Targets) -> Tensor:
    """Mean of ``losses`` [B, L, H] where the target is known."""
    return (losses * targets.known).sum() / targets.known.sum().clamp(min=1)


def array(value: Tensor) -> NDArray[Any]:
    """A contiguous copy."""
    return np.ascontiguousarray(value.detach().cpu().numpy())


def hops_ahead(lookahead: int) -> tuple[int, ...]:
    """1 … lookahead."""
    return tuple(range(1, lookahead + 1))


class Stack(nn.Module):
    """A linear map of its own for every layer: [B, len(layers), I] → [B, len(layers), O]."""

    def __init__(self, layers: int, inputs: int, outputs: int, *, zero: bool = False) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.zeros(layers, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(layers, outputs))
        if not zero:
            nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, layers: Tensor) -> Tensor:
        whole = len(layers) == len(self.weight)
        weight, bias = (self.weight, self.bias) if whole else (self.weight[layers], self.bias[layers])
        return torch.baddbmm(bias[:, None], x.transpose(0, 1), weight).transpose(0, 1)

    if TYPE_CHECKING:
        __call__ = forward


def experts_mask(experts: Sequence[int], hops: Sequence[int]) -> Tensor:
    """0 where the target layer has the expert, -1e4 where it does not, [L, H, E]; hops beyond L wrap around."""
    exists = torch.arange(max(experts)) < torch.tensor(list(experts))[:, None]
    wrapped = torch.stack([exists.roll(-hop, 0) for hop in hops], dim=1)
    return torch.where(wrapped, 0.0, -1e4)
