"""How fast one expert computes on cold memory, beside how fast the same memory can be read at all.

Shapes: D hidden, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import _default_apply_gate

from foregate.checkpoint.layout import lay_out
from foregate.checkpoint.quantise import PLAIN, parse_scheme, quantised_layout
from foregate.experts.compute import SlotViews, expert_forward
from foregate.experts.slots import SlotPool
from foregate.native import kernels
from foregate.types import ExpertLayout

KINDS = ("bf16", "int8", "int4/32", "int4/64")
"""Formats that ``kernel_speed`` measures: bf16, or a quantisation as ``parse_scheme`` reads it."""


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """Medians over rounds. GB are 1e9 bytes of weights and scales; ``instructions`` is ``torch`` without kernels."""

    kind: str
    threads: int
    tokens: int
    hidden: int
    width: int
    expert_bytes: int
    expert_us: float
    gb_per_s: float
    read_gb_per_s: float
    instructions: str

    @property
    def share(self) -> float:
        """Of the plain read bandwidth; 0.8 is what the kernels aim at."""
        return self.gb_per_s / self.read_gb_per_s


def kernel_speed(
    kind: str = "int8",
    *,
    threads: int | None = None,
    tokens: int = 1,
    hidden: int = 2048,
    width: int = 768,
    memory_bytes: int = 256 << 20,
    rounds: int = 5,
) -> KernelSpeed:
    """Run experts of ``hidden`` x ``width`` that fill ``memory_bytes`` (more than any cache), one after another.

    Computing and reading alternate, ``rounds`` times each. ``threads`` None: as torch is set. Raises ConfigError for an
    unknown ``kind``.
    """
    with _threads(threads) as count:
        layout = _layout(kind, hidden, width)
        pool = SlotPool(max(2, memory_bytes // layout.nbytes), layout.nbytes)
        _fill(pool, layout)
        views, module = SlotViews(pool), _Experts(hidden, width)
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
        weights = [views.weights(slot, layout) for slot in range(pool.slots)]
        computing, reading = [], []
        with torch.inference_mode():
            for _ in range(rounds + 1):
                began = perf_counter()
                for expert in weights:
                    expert_forward(module, x, expert)
                between = perf_counter()
                read_memory(pool, count)
                computing.append(between - began)
                reading.append(perf_counter() - between)
        seconds = median(computing[1:]) / pool.slots
        return KernelSpeed(
            kind=kind,
            threads=count,
            tokens=tokens,
            hidden=hidden,
            width=width,
            expert_bytes=layout.weight_bytes,
            expert_us=seconds * 1e6,
            gb_per_s=layout.weight_bytes / seconds / 1e9,
            read_gb_per_s=pool.capacity_bytes / median(reading[1:]) / 1e9,
            instructions=kernels.instructions(),
        )


def read_memory(pool: SlotPool, threads: int) -> None:
    """Read every byte of ``pool`` and do nothing with it."""
    library = kernels.library()
    for slot in range(pool.slots):
        words = np.frombuffer(pool.view(slot), np.int64)
        if library is None:
            words.sum()
        else:
            library.foregate_read(words.ctypes.data, words.nbytes, threads)


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)


def _layout(kind: str, hidden: int, width: int) -> ExpertLayout:
    plain = lay_out([("gate_up_proj", "BF16", (2 * width, hidden)), ("down_proj", "BF16", (hidden, width))])
    return quantised_layout(plain, PLAIN if kind == "bf16" else parse_scheme(kind), transposed=False)


def _fill(pool: SlotPool, layout: ExpertLayout) -> None:
    """Small numbers everywhere: bf16 and float32 scales of about 0.01, integers of any value."""
    for slot in range(pool.slots):
        memory = np.frombuffer(pool.view(slot), np.uint8)
        for param in layout.params:
            part = memory[param.offset : param.offset + param.nbytes]
            if param.dtype == "F32":
                part.view(np.float32)[:] = 0.01
            elif param.dtype == "BF16":
                part.view(np.uint16)[:] = 0x3C24
            else:
                part.view(np.uint32)[:] = np.arange(slot, slot + part.size // 4, dtype=np.uint32) * np.uint32(
                    2654435761
                )


class _Experts(nn.Module):
    """A plain family's experts module, as transformers' decorator makes it."""

    has_gate = is_concatenated = True
    is_transposed = has_bias = False
    _apply_gate: Any = _default_apply_gate

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        with torch.device("meta"):
            self.gate_up_proj = nn.Parameter(torch.empty(1, 2 * width, hidden, dtype=torch.bfloat16))
            self.down_proj = nn.Parameter(torch.empty(1, hidden, width, dtype=torch.bfloat16))
        self.act_fn = nn.SiLU()
