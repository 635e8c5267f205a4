"""Default vectors: what a model's experts give on average, counted again token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from foregate.trace.routing import MoeLayer, moe_layers
from foregate.training.calibration import Calibrator
from test_checkpoint_support import tiny

PASSES = (torch.arange(5, 45)[None] % 250, torch.arange(90, 120)[None] % 250)


def load(path: Path, family: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny(path, family), dtype=torch.float32).eval()


def alone(layer: MoeLayer, x: Tensor, expert: int, weight: float) -> Tensor:
    """What ``expert`` gives for ``x`` [D] at weight 1 (Llama 4: at ``weight``, which is in what it gets)."""
    module: Any = layer.module
    if not layer.scaled:
        out: Tensor = module.forward(x[None], torch.tensor([[expert]]), torch.ones(1, 1))
        return out[0]
    rows = torch.zeros(layer.experts, len(x))
    rows[expert] = weight * x
    scaled: Tensor = module.forward(rows)
    return scaled.view(layer.experts, -1)[expert]


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "granitemoe", "deepseek_v2", "llama4_text"])
@pytest.mark.parametrize("passes", [PASSES, (PASSES[0][:, :2],)], ids=["long", "two tokens"])
@torch.inference_mode()
def test_a_mean_over_tokens_of_other_experts(family: str, passes: tuple[Tensor, ...], tmp_path: Path) -> None:
    model = load(tmp_path / "model", family)
    layers, hidden = moe_layers(model), model.config.hidden_size
    calibrator = Calibrator(model, layers, hidden)
    seen: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in layers]
    scale = getattr(model.config, "residual_multiplier", 1.0)
    for number, (layer, part) in enumerate(zip(layers, calibrator._flow.parts, strict=True)):
        watch(layer, part.router, seen[number])
    for ids in passes:
        model(input_ids=ids, use_cache=False)
        calibrator.next_pass(ids.shape[1])
    calibrator.close()
    found = calibrator.vectors()
    assert calibrator.tokens == sum(ids.shape[1] for ids in passes)
    for number, layer in enumerate(layers):
        sums, counts = torch.zeros(layer.experts, hidden), torch.zeros(layer.experts)
        for x, index, weights in seen[number]:
            for row, chosen, given in zip(x, index, weights, strict=True):
                for expert, weight in zip(chosen.tolist(), given.tolist(), strict=True):
                    sums[expert] += alone(layer, row, expert, weight)
                    counts[expert] += weight if layer.scaled else 1
        there = counts > 0
        assert there.sum() > 1 or layer.scaled
        assert passes is PASSES or (~there).any(), "no expert without tokens"
        assert torch.allclose(found[number, : layer.experts][there], scale * (sums / counts[:, None])[there], atol=1e-4)
        mean = scale * sums.sum(0) / counts.sum()
        assert torch.allclose(found[number, : layer.experts][~there], mean.expand(int((~there).sum()), -1), atol=1e-4)


def watch(layer: MoeLayer, router: Any, seen: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Every input of the experts [T, D], with their choice and its weights, both [T, k]."""
    if not layer.scaled:
        layer.module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(tuple([*args, *kwargs.values()][:3])), with_kwargs=True
        )
        return

    def after(_: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        scores, logits = output
        index = logits.argmax(dim=1, keepdim=True)
        seen.append((args[0].reshape(len(index), -1), index, scores.gather(1, index)))

    router.register_forward_hook(after)


@torch.inference_mode()
def test_what_shared_experts_and_the_stream_add(tmp_path: Path) -> None:
    model = load(tmp_path / "model", "llama4_text")
    layers = moe_layers(model)
    calibrator = Calibrator(model, layers, model.config.hidden_size)
    shared: list[Tensor] = []
    decoder = calibrator._flow.parts[0].decoder
    decoder.feed_forward.shared_expert.register_forward_hook(lambda _, args, output: shared.append(output.clone()))
    for ids in PASSES:
        model(input_ids=ids, use_cache=False)
        calibrator.next_pass(ids.shape[1])
    calibrator.close()
    mean = torch.cat([out.reshape(-1, out.shape[-1]) for out in shared]).mean(0)
    assert torch.allclose(calibrator.others()[0], mean, atol=1e-4)
