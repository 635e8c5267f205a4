"""Default vectors for ``quasi-hidden``: one more pass over the training tokens, with the model itself.

Shapes: T tokens of a pass, L MoE layers, E experts of the widest layer, k chosen, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foregate.checkpoint.anatomy import FlowWatcher
from foregate.checkpoint.locate import locate
from foregate.checkpoint.opening import open_checkpoint
from foregate.errors import CheckpointError, ConfigError, TraceError
from foregate.trace.routing import MoeLayer, chosen, chosen_scaled, hidden_states, moe_layers
from foregate.training.dataset import TRAIN, Dataset
from foregate.training.trainer import Fitted, Options, Trainer, Watch

_LEAST = 1e-9


@dataclass(frozen=True)
class CalibrationOptions(Options):
    """``tokens``: how many training tokens to run, whole prompts; ``model``: where the traced model is, if its name in
    the trace does not say."""

    tokens: int = 20_000
    model: str = ""


class Calibrator:
    """Sums what experts give, while the model runs; ``close`` takes its hooks off. For models with all experts in
    memory, or under an engine: experts are asked once more, through the model's own module, for what each gives alone.

    Llama 4's experts are not: they get their router weight before, so what they give is divided by the sum of these
    weights, which ``counts`` holds there.
    """

    def __init__(self, model: nn.Module, layers: list[MoeLayer], hidden: int) -> None:
        width = max(layer.experts for layer in layers)
        self.sums = torch.zeros(len(layers), width, hidden)
        self.counts = torch.zeros(len(layers), width)
        self.rest = torch.zeros(len(layers), hidden)
        self.tokens = 0
        config: Any = model.config
        # Granite scales what a block adds to the residual stream
        self._scale = float(getattr(config.get_text_config(), "residual_multiplier", 1.0))
        self._flow = FlowWatcher(model, [layer.path for layer in layers], [layer.experts for layer in layers])
        self._given: list[Tensor | None] = [None] * len(layers)
        self._handles: list[Any] = []
        self._chosen: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        for number, (layer, part) in enumerate(zip(layers, self._flow.parts, strict=True)):
            if layer.scaled and part.router is not None:
                self._handles.append(part.router.register_forward_hook(self._after_router(number)))
            hook = self._after_scaled(number) if layer.scaled else self._after_experts(number, layer)
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
            self._handles.append(part.decoder.register_forward_hook(self._after_layer(number)))

    def close(self) -> None:
        """Remove every hook; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._flow.close()

    def vectors(self) -> Tensor:
        """Mean output [L, E, D] per router weight; of an expert that no token went to, the mean of its layer."""
        seen = self.counts[..., None]
        average = self.sums.sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=_LEAST)
        return torch.where(seen > 0, self.sums / seen.clamp(min=_LEAST), average) * self._scale

    def others(self) -> Tensor:
        """Mean [L, D] of what a layer adds to the residual stream after attention besides its routed experts."""
        return self.rest / max(self.tokens, 1)

    def next_pass(self, tokens: int) -> None:
        """A pass over ``tokens`` has ended."""
        self.tokens += tokens
        if self._flow.learning:
            self._flow.stop_learning()

    def _after_experts(self, number: int, layer: MoeLayer) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = hidden_states(args, kwargs)
            index, weights = chosen(args, kwargs)
            assert x is not None
            self._given[number] = output.reshape(len(index), -1).float()
            token, rank = torch.where((index >= 0) & (index < layer.experts))
            experts = index[token, rank]
            rows = x.reshape(len(index), -1)[token]
            # each pair of token and expert as a token of its own; .forward, so that hooks of tracers see no probe
            out = module.forward(rows, experts[:, None], weights.new_ones(len(rows), 1)).reshape(len(rows), -1)
            self.sums[number].index_add_(0, experts, out.float())
            self.counts[number] += torch.bincount(experts, minlength=self.counts.shape[1])

        return after

    def _after_router(self, number: int) -> Callable[..., None]:
        def after(router: Any, _: Any, output: Any) -> None:
            self._chosen[number] = chosen_scaled(output, int(router.top_k))

        return after

    def _after_scaled(self, number: int) -> Callable[..., None]:
        """Llama 4's form: weights are in what the experts get, so outputs are those of their weights."""

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            found = self._chosen[number]
            assert found is not None
            index, weights = found
            outputs = output.reshape(-1, len(index), output.shape[-1]).float()  # [E, T, D]
            self._given[number] = outputs.sum(0)
            token = torch.arange(len(index), device=index.device).repeat_interleave(index.shape[1])
            experts = index.flatten()
            self.sums[number].index_add_(0, experts, outputs[experts, token])
            self.counts[number].index_add_(0, experts, weights.flatten().float())

        return after

    def _after_layer(self, number: int) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            residual, given = self._flow.parts[number].residual, self._given[number]
            stream = output[0] if isinstance(output, (tuple, list)) else output
            if residual is None or given is None or not isinstance(stream, Tensor):
                return
            added = stream.reshape(-1, stream.shape[-1]).float() - residual.float()
            self.rest[number] += (added - self._scale * given).sum(0)

        return after


@torch.inference_mode()
def fit_default_vectors(data: Dataset, options: CalibrationOptions, watch: Watch) -> Fitted:
    """Run training prompts through the traced model. Raises ConfigError, CheckpointError, TraceError where it is not
    to be had, is another one, or the trace does not know its tokens."""
    data.require(TRAIN)
    name = options.model or data.model.name
    model = _load(name, data)
    layers = moe_layers(model)
    calibrator = Calibrator(model, layers, data.model.hidden_size)
    watch.begin("calibrate", min(options.tokens, data.tokens(TRAIN)))
    try:
        for ids in _sequences(data, options.tokens):
            model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
            calibrator.next_pass(len(ids))
            watch.advance(len(ids))
    finally:
        calibrator.close()
    tensors = {"experts": calibrator.vectors().numpy(), "rest": calibrator.others().numpy()}
    unseen = int((calibrator.counts == 0).sum())
    return Fitted(tensors, {}, {"tokens": calibrator.tokens, "experts_without_tokens": unseen})


def _sequences(data: Dataset, tokens: int) -> Iterator[np.ndarray[Any, Any]]:
    left = tokens
    for prompt in data.prompts(TRAIN):
        if left <= 0:
            return
        if (prompt.token_id < 0).any():
            raise TraceError(f"prompt {prompt.name}: its token ids were not traced, so it cannot be run again")
        left -= prompt.tokens
        yield prompt.token_id.astype(np.int64)


def _load(name: str, data: Dataset) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        checkpoint = open_checkpoint(locate(name))
    except CheckpointError as error:
        hint = "" if name != data.model.name else "; the traces know its name alone: give --model DIRECTORY"
        raise CheckpointError(f"{error}{hint}") from error
    if checkpoint.packed:
        raise ConfigError(f"{name} is a pack, which transformers cannot load; give --model ORIGINAL")
    if checkpoint.fingerprint != data.model.fingerprint:
        raise ConfigError(
            f"{name} has fingerprint {checkpoint.fingerprint[:12]}, the traces are of {data.model.fingerprint[:12]}; "
            "give --model DIRECTORY"
        )
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.directory, dtype=checkpoint.skeleton.dtype, local_files_only=True
    ).eval()


QUASI_HIDDEN = Trainer(fit_default_vectors, CalibrationOptions)
