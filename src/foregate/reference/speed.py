"""How fast this machine trains, eager and compiled, and how many tokens fit into a given time."""

from __future__ import annotations

import time

import torch

from foregate.reference.model import ModelConfig, forward, head_loss
from foregate.reference.optimizer import MixedPrecisionAdamW
from foregate.reference.train import TrainConfig, pick_layer

MARGIN = 0.75  # a quarter of the time is left for other load, exports and the evaluation


def tokens_per_second(model: ModelConfig, config: TrainConfig, steps: int = 5) -> float:
    """Median over `steps` whole steps (random tokens, optimizer included) after two warm-up steps."""
    optimizer = MixedPrecisionAdamW(model, 0, (config.beta1, config.beta2), config.weight_decay, config.clip)
    run_layer, _ = pick_layer(config.compile)
    capacity = model.capacity(config.tokens_per_step, config.capacity_factor)
    block = torch.randint(model.vocab_size, (config.rows, config.length + 1))
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        result = forward(model, optimizer.weights, block[:, :-1], capacity, run_layer)
        head_loss(result.hidden, optimizer.weights.embedding, block[:, 1:]).backward()  # type: ignore[no-untyped-call]
        optimizer.step(0.0)
        times.append(time.perf_counter() - began)
    return config.tokens_per_step / sorted(times[2:])[steps // 2]


def tokens_for(minutes: float, rate: float) -> int:
    """Tokens to ask for so that training ends within `minutes`, in whole thousands."""
    return int(minutes * 60 * rate * MARGIN) // 1000 * 1000
