"""Seeded tiny checkpoints (below 2 MB) of every MoE family, laid out on disk as the hub has them.

The weights are random and so is the routing: right for correctness, meaningless for prediction.
Shapes: E experts, D hidden.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from foregate.testing.families import FAMILIES, REFUSED, REQUIRED, config_of
from foregate.testing.tokenizer import BOS, EOS, PAD, save_tokenizer

__all__ = ["FAMILIES", "REFUSED", "REQUIRED", "build"]

GAINS = (
    (re.compile(r"\.(gate|router)(\.(wg|proj|layer|classifier))?\.weight$"), 4.0),
    (re.compile(r"\.gate\.(down_proj|router_mlp\.\w+)\.weight$"), 2.0),  # Zaya's router has four matrices
    (re.compile(r"embed"), 0.5),
)
"""Standard deviation of the output for a normed input, where it is not 1. Router logits: far from ties, far from a
single expert. Embeddings: small beside what the layers add, or tied ones make the model repeat one token."""

JITTERS = ((re.compile(r"(hidden_states|residual)_bias$"), 0.01), (re.compile(r""), 0.1))
"""Standard deviation around the own initial value, for norms, biases and everything else that is no matrix; less for
what is added to the residual stream, or every token looks alike. The first pattern that fits counts."""


def build(family: str, directory: Path, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
    """Write a tiny checkpoint of ``family`` to ``directory`` and return it. Same arguments, same bytes.

    ``overrides`` replace keys of the config. The output row of the end token is zero, so its logit never wins and
    greedy generation runs to the length asked for.
    """
    directory = Path(directory)
    config = AutoConfig.for_model(family, **config_of(family, **overrides))
    model = randomised(config, seed, getattr(torch, dtype))
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    with no_progress_bar():
        model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers draws one for the single shard of a tiny checkpoint."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def randomised(config: Any, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model of ``config`` in which every parameter and every stored buffer is seeded random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, tensor in stored_tensors(model):
            tensor.copy_(random_value(name, tensor, seed))
        for name, table, experts in hash_tables(model):
            table.copy_(random_table(name, table, experts, seed))
        model.get_output_embeddings().weight[EOS] = 0.0
    return model


def stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters (tied ones once) and the biases and scales among the stored buffers, by name.

    The other buffers (decay tables, n-gram multipliers) are functions of the config.
    """
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if "bias" in name or "scalar" in name)


def hash_tables(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Token → experts tables [V, k] of routers that hash the token instead of scoring it, with their E."""
    for name, module in model.named_modules():
        if hasattr(module, "tid2eid"):
            yield name, module.tid2eid, module.num_experts


def source(name: str, seed: int) -> np.random.Generator:
    """The generator of the tensor ``name``: independent of every other tensor's, the same on every platform."""
    return np.random.Generator(np.random.SFC64([seed, crc32(name.encode())]))


def random_table(name: str, table: torch.Tensor, experts: int, seed: int) -> torch.Tensor:
    """k distinct experts for each token."""
    order = source(name, seed).random((table.shape[0], experts)).argsort(axis=1)
    return torch.from_numpy(order[:, : table.shape[1]])


def random_value(name: str, tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """The value of the tensor ``name``, in float32."""
    noise = torch.from_numpy(source(name, seed).standard_normal(tuple(tensor.shape), dtype=np.float32))
    if tensor.ndim < 2 or name.endswith(("A_log", "bias")):
        return tensor.float() + first_match(JITTERS, name) * noise
    fan_in = tensor[0].numel() if tensor.ndim == 2 else tensor.shape[-1]
    return noise * first_match(GAINS, name, default=1.0) / math.sqrt(fan_in)


def first_match(table: tuple[tuple[re.Pattern[str], float], ...], name: str, default: float = 0.0) -> float:
    """The number of the first pattern found in ``name``."""
    return next((number for pattern, number in table if pattern.search(name)), default)
