"""Figures of an exported model, measured through transformers alone: held-out loss, expert load, samples.

Nothing is dropped here: transformers runs every chosen expert. Shapes: L layers, E experts, k chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from foregate.reference.data import Corpus, TokenisedDomain, held_out_blocks

DEAD_BELOW = 0.2  # of the uniform load
PROMPTS = {
    "math": "Question: A baker sells 12 loaves of bread in the morning and twice as many in the afternoon. "
    "How many loaves does the baker sell in a day?\nAnswer:",
    "code": 'def read_lines(path):\n    """Return the lines of a file.',
    "prose": "The following options control how the server handles",
}


@dataclass(frozen=True)
class DomainFigures:
    """Held-out figures of a domain; loss in nats per token."""

    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True)
class LayerLoad:
    """Shares of a layer's choices, relative to uniform (1 / E); entropy is 1 where uniform."""

    lowest: float
    highest: float
    entropy: float


@dataclass(frozen=True)
class Evaluation:
    """All figures of one exported model. Load is over all domains with equal token counts."""

    length: int
    domains: dict[str, DomainFigures]
    layers: tuple[LayerLoad, ...]
    domain_entropy: dict[str, float]
    dead_experts: tuple[tuple[int, int], ...]
    samples: dict[str, dict[str, str]]

    @property
    def mean_entropy(self) -> float:
        """Normalised entropy of the load, mean over layers."""
        return sum(layer.entropy for layer in self.layers) / len(self.layers)

    def as_json(self) -> dict[str, Any]:
        """For training.json; floats are rounded to four digits."""
        value: dict[str, Any] = _rounded(asdict(self))
        value["mean_entropy"] = round(self.mean_entropy, 4)
        value["dead_below_share_of_uniform"] = DEAD_BELOW
        return value


def evaluate(folder: Path, corpus: Corpus, length: int = 256, tokens: int = 20_000, sample: int = 64) -> Evaluation:
    """Measure the model in `folder` on about `tokens` held-out tokens of each domain; continue the fixed prompts."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    figures: dict[str, DomainFigures] = {}
    loads: dict[str, Tensor] = {}
    for domain in corpus.domains:
        with counted_choices(model) as counts:
            figures[domain.name] = _held_out(model, corpus, domain, length, tokens)
        loads[domain.name] = torch.stack(counts).double()
    shares = torch.stack([load / load.sum(-1, keepdim=True) for load in loads.values()]).mean(0)
    dead = (shares * shares.shape[-1] < DEAD_BELOW).nonzero().tolist()
    return Evaluation(
        length=length,
        domains=figures,
        layers=tuple(_layer_load(row) for row in shares),
        domain_entropy={name: _mean_entropy(load) for name, load in loads.items()},
        dead_experts=tuple((int(index), int(expert)) for index, expert in dead),
        samples=samples(model, folder, {name: PROMPTS[name] for name in figures if name in PROMPTS}, sample),
    )


@contextmanager
def counted_choices(model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Count how often each router chooses each expert: one tensor [E] a layer, filled while the block runs."""
    routers = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
    counts = [torch.zeros(int(router.weight.shape[0]), dtype=torch.long) for router in routers]
    handles = [router.register_forward_hook(_counter(count)) for router, count in zip(routers, counts, strict=True)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _counter(count: Tensor) -> Any:
    def hook(_module: torch.nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        count.add_(torch.bincount(outputs[2].reshape(-1), minlength=count.numel()))

    return hook


@torch.no_grad()
def _held_out(
    model: torch.nn.Module, corpus: Corpus, domain: TokenisedDomain, length: int, tokens: int
) -> DomainFigures:
    blocks = torch.stack(list(held_out_blocks(domain, length, tokens)))
    total = 0.0
    for batch in torch.split(blocks, 8):
        logits = model(batch[:, :-1]).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    predicted = blocks[:, 1:].reshape(-1)
    size = len(corpus.tokenizer.decode(predicted.tolist(), skip_special_tokens=False).encode())
    loss = total / predicted.numel()
    return DomainFigures(predicted.numel(), loss, math.exp(loss), total / math.log(2) / size)


def samples(model: Any, folder: Path, prompts: dict[str, str], length: int) -> dict[str, dict[str, str]]:
    """Greedy continuations of the prompts, `length` new tokens each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {}
    for name, prompt in prompts.items():
        encoded = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**encoded, max_new_tokens=length, do_sample=False)
        new = output[0, encoded["input_ids"].shape[1] :]
        found[name] = {"prompt": prompt, "continuation": str(tokenizer.decode(new, skip_special_tokens=True))}
    return found


def _entropy(shares: Tensor) -> float:
    return float(torch.special.entr(shares).sum() / math.log(shares.numel()))


def _mean_entropy(load: Tensor) -> float:
    return sum(_entropy(row / row.sum()) for row in load) / len(load)


def _layer_load(shares: Tensor) -> LayerLoad:
    count = shares.numel()
    return LayerLoad(float(shares.min()) * count, float(shares.max()) * count, _entropy(shares))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
