"""Every family: the trace holds what the router chose, resident and under the engine, and the model notices nothing.

The truth comes from elsewhere than the tracker's hooks: from an experts function of our own, and from the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.testing.tiny import FAMILIES, no_progress_bar
from foregate.trace.header import RunInfo
from foregate.trace.reader import TraceReader
from foregate.trace.routing import moe_layers
from foregate.trace.tracker import RouterTracker
from foregate.trace.writer import TraceWriter
from foregate.types import RoutingStep

PROMPT = [5, 90, 17, 33, 101, 64, 200, 8, 8, 71, 45]
NEW = 10
RUN = RunInfo("resident", {}, 0, {"name": "test"}, {}, "2026-11-23T00:00:00Z")
ALL = sorted({*FAMILIES, "llama4_text"})
Tiny = Callable[[str], Path]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def load(directory: Path) -> Any:
    with no_progress_bar():
        return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True).eval()


@torch.inference_mode()
def generate(model: Any) -> tuple[list[int], torch.Tensor]:
    """Greedy continuation of PROMPT, and the logits of every step."""
    ids, past, tokens, logits = PROMPT, None, [], []
    for _ in range(NEW):
        out = model(input_ids=torch.tensor([ids]), past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits.append(out.logits[0, -1])
        ids = [int(out.logits[0, -1].argmax())]
        tokens += ids
    return tokens, torch.stack(logits)


@contextmanager
def spied(model: Any) -> Iterator[dict[str, list[Any]]]:
    """Indices and weights of every call of transformers' experts interface, by module path."""
    seen: dict[str, list[Any]] = {}
    names = {module: name for name, module in model.named_modules()}

    def spy(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        seen.setdefault(names[self], []).append((top_k_index.numpy().copy(), top_k_weights.numpy().copy()))
        inner = ALL_EXPERTS_FUNCTIONS.get_interface(before[id(self.config)], type(self).forward.__wrapped__)
        return inner(self, hidden_states, top_k_index, top_k_weights)

    ALL_EXPERTS_FUNCTIONS.register("foregate-spy", spy)
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: config._experts_implementation for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation = "foregate-spy"
    try:
        yield seen
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]


def hooks_of(model: Any) -> dict[str, list[dict[Any, Any]]]:
    return {name: [dict(getattr(module, hook)) for hook in HOOKS] for name, module in model.named_modules()}


def attributes_of(model: Any) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


def stored(tmp_path: Path, tracker: RouterTracker, record: Any) -> Any:
    """The record written to a trace and read back."""
    with TraceWriter(tmp_path / "trace") as writer:
        writer.begin(tracker.header(RUN))
        writer.add(record)
        writer.finish()
    return next(iter(TraceReader(tmp_path / "trace")))


def assert_choice(part: Any, layer: int, index: Any, weights: Any) -> None:
    """The first tokens of the trace have these experts [T, k], in this order, with these weights, in MoE ``layer``."""
    rows, width = index.shape
    assert np.array_equal(part.grid(part.experts)[:rows, layer, :width], index)
    assert np.array_equal(part.grid(part.weights)[:rows, layer, :width], weights.astype(np.float16))


@pytest.mark.parametrize("family", ALL)
def test_a_resident_model_is_traced_exactly_and_left_as_it_was(family: str, tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny(family))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with spied(model) as truth:
        tokens, _ = generate(model)
    plain_tokens, plain_logits = generate(model)
    hooks, attributes = hooks_of(model), attributes_of(model)
    with RouterTracker(model, scores=True, timings=True) as tracker:
        traced_tokens, traced_logits = generate(model)
        record = tracker.take("p", "test")
    assert traced_tokens == plain_tokens == tokens
    assert torch.equal(traced_logits, plain_logits)
    assert hooks_of(model) == hooks
    assert attributes_of(model) == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    part = stored(tmp_path, tracker, record)
    layers = moe_layers(model)
    assert part.grid(part.position)[:, 0].tolist() == list(range(len(PROMPT) + NEW - 1))
    assert part.grid(part.token_id)[:, 0].tolist() == PROMPT + traced_tokens[:-1]
    assert part.grid(part.decode)[:, 0].tolist() == [False] * len(PROMPT) + [True] * (NEW - 1)
    if family != "llama4_text":
        assert list(truth) == [layer.path for layer in layers]
    for number, layer in enumerate(layers):
        calls = truth.get(layer.path)
        if calls:
            assert_choice(part, number, *(np.concatenate(column) for column in zip(*calls, strict=True)))


@pytest.mark.parametrize("family", ALL)
def test_the_engine_is_traced_exactly(family: str, tiny: Tiny, tmp_path: Path) -> None:
    with Engine(RunConfig(model=str(tiny(family)), memory_budget="50%", predictor="none")) as engine:
        steps: list[RoutingStep] = []

        class Observer:
            def on_route(self, step: RoutingStep) -> None:
                steps.append(step)

        engine.observers.append(Observer())
        sampling = SamplingConfig(max_new_tokens=NEW)
        plain = [step.token_id for step in engine.stream(PROMPT, sampling)]
        hooks = hooks_of(engine.model)
        steps.clear()
        with RouterTracker(engine, timings=True) as tracker:
            traced = [step.token_id for step in engine.stream(PROMPT, sampling)]
            record = tracker.take("p", "test", prompt_tokens=len(PROMPT))
        assert traced == plain
        assert hooks_of(engine.model) == hooks
        part = stored(tmp_path, tracker, record)
        for number in range(engine.spec.layers):
            of_layer = [step for step in steps if step.layer == number]
            index = np.concatenate([step.experts for step in of_layer])
            weights = np.concatenate([step.weights for step in of_layer])
            assert_choice(part, number, index, weights)
        assert part.grid(part.position)[:, 0].tolist() == list(range(len(PROMPT) + NEW - 1))
        waited, experts = part.timing("expert_wait_ns"), part.timing("experts_ns")
        assert ((waited >= 0) == (experts > 0)).all()
        assert (waited <= experts).all()
