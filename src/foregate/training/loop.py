"""The training loop of every learned method: epochs over shuffled prompts, early stopping, checkpoints, a loss curve.

A checkpoint holds everything that later steps depend on, so a training that was killed ends with the same bytes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from foregate.errors import ConfigError
from foregate.training.dataset import TRAIN, VALIDATION, Block, Dataset
from foregate.training.judge import CACHE_SHARE, Judge
from foregate.training.learner import Learner, LearnOptions
from foregate.training.trainer import Fitted, Watch
from foregate.training.view import Tensors

STATE = "state.pt"
SAVE_SECONDS = 60.0
WARMUP = 0.02
"""Share of all steps in which the learning rate rises."""
LEAST_RATE = 0.02
"""The last learning rate, as a share of the largest."""


@dataclass
class Progress:
    """Where a training is. ``best`` are the weights with the best objective so far."""

    epoch: int = 0
    block: int = 0
    tokens: int = 0
    step: int = 0
    best_epoch: int = -1
    best_metrics: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)

    def stale(self, patience: int) -> bool:
        """Whether the last ``patience`` epochs brought nothing."""
        return self.best_epoch >= 0 and self.epoch - self.best_epoch > patience


class Training:
    """One training of one learner. ``run`` starts it, or continues from the checkpoint in ``watch.state``.

    A ``second`` one of the same file has a name, a checkpoint of its own, and steps that follow those of the first.
    """

    def __init__(
        self,
        learner: Learner,
        data: Dataset,
        options: LearnOptions,
        watch: Watch,
        *,
        second: str = "",
        before: int = 0,
    ) -> None:
        data.require(TRAIN, VALIDATION)
        self._learner, self._data, self._options, self._watch = learner, data, options, watch
        self._optimizer = torch.optim.AdamW(
            _groups(learner, options.weight_decay), lr=options.learning_rate, betas=(0.9, 0.98), fused=True
        )
        self._at = Progress()
        self._total = data.tokens(TRAIN)
        self._name, self._before = second, before
        self._path = watch.state / f"{second}{STATE}"
        self._saved = monotonic()

    def run(self) -> Fitted:
        """Train to the end and give the best weights."""
        options, at = self._options, self._load()
        self._watch.begin(self._name or "training", options.epochs * self._total)
        self._watch.advance(at.epoch * self._total + at.tokens)
        while at.epoch < options.epochs and not at.stale(options.patience):
            self._epoch()
        self._learner.load_state_dict(at.best)
        self._learner.eval()
        metrics = {**at.best_metrics, "epochs": at.epoch, "best_epoch": at.best_epoch + 1}
        return Fitted(self._learner.arrays(), self._learner.settings(), metrics)

    def _epoch(self) -> None:
        at, options = self._at, self._options
        self._learner.train()
        losses: list[float] = []
        for block in self._data.blocks(
            TRAIN,
            options.block,
            self._learner.features,
            shuffle=(options.seed, at.epoch),
            skip=at.block,
            cache_share=self._learner.cache_share,
        ):
            tensors = _tensors(self._learner, self._data, block)
            generator = torch.Generator().manual_seed(_mix(options.seed, at.epoch, at.block))
            size = tensors.tokens if self._learner.in_order else options.batch
            shuffled = None if self._learner.in_order else generator
            for view in tensors.batches(size, shuffled):
                losses.append(self._step(view, generator, len(view.at)))
            at.block += 1
            self._watch.advance(block.tokens)
            self._log({"loss": sum(losses) / len(losses)})
            losses.clear()
            if monotonic() - self._saved > SAVE_SECONDS:
                self._save()
        self._judge()
        at.epoch, at.block, at.tokens = at.epoch + 1, 0, 0
        self._save()

    @property
    def steps(self) -> int:
        """Taken so far, those before it included."""
        return self._before + self._at.step

    def _log(self, said: Mapping[str, Any]) -> None:
        stage = {"stage": self._name} if self._name else {}
        self._watch.log({"step": self.steps, "epoch": self._at.epoch + 1, **stage, **said})

    def _step(self, view: Any, generator: torch.Generator, tokens: int) -> float:
        at, learner = self._at, self._learner
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.learning_rate * self._rate()
        layers = learner.choose_layers(self._data.layers, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._options.halves):
            scores = learner.scores(view, layers)
        loss = learner.loss(scores.float(), view.targets(learner.hops, layers))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        self._optimizer.step()
        at.step += 1
        at.tokens += tokens
        return loss.item()

    def _rate(self) -> float:
        """Learning rate as a share of the largest: a short rise, then a cosine over all epochs."""
        done = (self._at.epoch + self._at.tokens / self._total) / self._options.epochs
        return min(1.0, (done + 1e-3) / WARMUP) * (LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * done)) / 2)

    def _judge(self) -> None:
        at = self._at
        metrics = judge(self._learner, self._data, VALIDATION, self._options)
        value, best = metrics[self._learner.objective], at.best_metrics.get(self._learner.objective)
        if value is None:
            raise ConfigError(f"the validation prompts say nothing of {self._learner.objective}; trace longer ones")
        self._log({"validation": _scalars(metrics)})
        if best is None or (value < best if self._learner.objective == "loss" else value > best):
            at.best_epoch, at.best_metrics = at.epoch, metrics
            at.best = copy.deepcopy(self._learner.state_dict())

    def _save(self) -> None:
        self._saved = monotonic()
        path = self._path
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "progress": self._at.__dict__,
            "weights": self._learner.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        beside = path.with_suffix(".tmp")
        torch.save(state, beside)
        beside.replace(path)

    def _load(self) -> Progress:
        path = self._path
        if path.exists():
            try:
                state = torch.load(path, weights_only=True)
                self._learner.load_state_dict(state["weights"])
            except Exception as error:  # whatever a damaged pickle, zip or another version makes torch raise
                raise ConfigError(
                    f"{path}: no checkpoint of this training ({type(error).__name__}); delete it"
                ) from None
            self._optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
            self._at = Progress(**state["progress"])
        return self._at


def judge(learner: Learner, data: Dataset, where: str, options: LearnOptions) -> dict[str, Any]:
    """Metrics of ``learner`` over a side; ``loss`` is its own."""
    learner.eval()
    judged, total, events = Judge(learner.hops, data.layers), 0.0, 0
    everything = torch.arange(data.layers)
    with torch.inference_mode():
        for block in data.blocks(
            where, options.block, learner.features, cache_share=learner.cache_share or CACHE_SHARE
        ):
            tensors = _tensors(learner, data, block)
            for view in tensors.batches(tensors.tokens if learner.in_order else options.batch, None):
                scores, targets = learner.scores(view, everything), view.targets(learner.hops)
                judged.add(scores, targets)
                known = learner.known(targets)
                total += float(learner.loss(scores, targets)) * known
                events += known
    return {"loss": round(total / events, 6) if events else None, **judged.metrics()}


def _tensors(learner: Learner, data: Dataset, block: Block) -> Tensors:
    return Tensors(block, data.model.experts_per_layer, data.score_kind, replay=learner.replays)


def _groups(learner: Learner, decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on vectors."""
    parameters = [value for value in learner.parameters() if value.requires_grad]
    return [
        {"params": [value for value in parameters if value.dim() > 1], "weight_decay": decay},
        {"params": [value for value in parameters if value.dim() <= 1], "weight_decay": 0.0},
    ]


def _scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not isinstance(value, dict)}


def _mix(*numbers: int) -> int:
    """One seed from several."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % 2**63
    return mixed
