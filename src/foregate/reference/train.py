"""The training loop: steps, checkpoints, the loss curve. Where the texts come from is `data`'s business.

Shapes: T = B x S tokens of a step, L layers, E experts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from foregate.errors import ForegateError
from foregate.reference.data import Batches, Corpus, DataError
from foregate.reference.export import export, read_exported
from foregate.reference.files import atomic_write, write_text
from foregate.reference.model import LayerFunction, ModelConfig, forward, head_loss, layer
from foregate.reference.optimizer import MixedPrecisionAdamW
from foregate.reference.schedule import Schedule

STATE, STABLE, CURVE = "state.pt", "stable.pt", "loss.jsonl"


class TrainingError(ForegateError):
    """A run that cannot be started or continued as asked."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train. `rows` sequences of `length` tokens a step; `tokens` is the length of the whole schedule."""

    tokens: int = 16_000_000
    rows: int = 16
    length: int = 256
    capacity_factor: float = 2.0
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    balance_coefficient: float = 0.01
    z_coefficient: float = 1e-4
    seed: int = 0
    save_every: int = 1_000_000
    export_every: int = 3_000_000
    log_every: int = 10
    compile: str = "auto"

    @property
    def tokens_per_step(self) -> int:
        """T."""
        return self.rows * self.length

    @property
    def steps(self) -> int:
        """Steps of the whole schedule."""
        return max(1, -(-self.tokens // self.tokens_per_step))


@dataclass(frozen=True)
class StepStats:
    """What a step yields. Rates are since the last one logged; balance is 1 where the load is uniform."""

    step: int
    tokens: int
    loss: float
    balance: float
    dropped: float
    lowest_load: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    seconds: float


class Interrupt:
    """Turns SIGTERM and SIGINT into a flag that the loop reads between two steps."""

    def __init__(self) -> None:
        self.requested = False

    def _request(self, _signum: int, _frame: FrameType | None) -> None:
        self.requested = True

    @contextmanager
    def installed(self) -> Iterator[Interrupt]:
        """Handlers are in place inside the block, the old ones after it."""
        old = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def pick_layer(choice: str) -> tuple[LayerFunction, bool]:
    """`layer`, compiled where asked for ("on") or possible ("auto"); compiled is 2.4 times as fast on Zen 5."""
    if choice not in ("auto", "on", "off"):
        raise TrainingError(f"compile {choice!r} is not one of auto, on, off")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if choice == "on" and compiler is None:
        raise TrainingError(f"compile 'on': no C++ compiler {os.environ.get('CXX', 'g++')!r} in PATH")
    if choice == "off" or compiler is None:
        return layer, False
    return torch.compile(layer, dynamic=False, fullgraph=True), True


class Trainer:
    """A run in a directory. Build it (or with `resumed`, `from_weights`), then iterate over `run()`."""

    def __init__(self, model: ModelConfig, config: TrainConfig, corpus: Corpus, run_dir: Path) -> None:
        self.model, self.config, self.corpus, self.run_dir = model, config, corpus, run_dir
        self.batches = Batches(corpus, config.rows, config.length, config.seed)
        self.batches.check(config.steps)
        self.optimizer = MixedPrecisionAdamW(
            model, config.seed, (config.beta1, config.beta2), config.weight_decay, config.clip
        )
        self.run_layer, self.compiled = pick_layer(config.compile)
        self.step = 0
        self.earlier_tokens = 0  # tokens that exported weights had seen before this run
        self.seconds = 0.0
        self.changes: list[dict[str, Any]] = []  # settings that were changed on resuming, for the record

    @classmethod
    def resumed(cls, model: ModelConfig, config: TrainConfig, corpus: Corpus, run_dir: Path) -> Trainer:
        """Continue the run in `run_dir` exactly where it stopped; a longer `tokens` reopens the constant phase."""
        trainer = cls(model, config, corpus, run_dir)
        state = read_state(run_dir / STATE)
        if state["step"] > trainer.schedule().decay_begins > 0 and state["config"]["tokens"] != config.tokens:
            raise TrainingError(
                f"--tokens {config.tokens}: step {state['step']} is already past its decay; ask for more tokens"
            )
        if state["step"] > old_decay_begin(state) and config.steps > old_steps(state):
            state = read_state(run_dir / STABLE)
        trainer._load(state)
        return trainer

    @classmethod
    def from_weights(
        cls, model: ModelConfig, config: TrainConfig, corpus: Corpus, run_dir: Path, weights: Path, tokens: int
    ) -> Trainer:
        """Start from an exported model that has seen `tokens` tokens; the optimizer is new and re-warmed."""
        trainer = cls(model, config, corpus, run_dir)
        trainer.optimizer.load_parameters(read_exported(weights))
        trainer.earlier_tokens = tokens
        return trainer

    def schedule(self) -> Schedule:
        """The learning-rate schedule of this run."""
        steps = self.config.steps
        return Schedule(
            self.config.learning_rate, steps, self.config.warmup_steps, int(steps * self.config.decay_share)
        )

    def run(self, interrupt: Interrupt) -> Iterator[StepStats]:
        """Train to the end of the schedule or to an interrupt; the state is saved in both cases."""
        schedule = self.schedule()
        capacity = self.model.capacity(self.config.tokens_per_step, self.config.capacity_factor)
        saved = self.step
        while self.step < self.config.steps and not interrupt.requested:
            if self.step == schedule.decay_begins:
                self.save(STABLE)
            yield self._step(schedule, capacity)
            if (self.step - saved) * self.config.tokens_per_step >= self.config.save_every:
                self.save(STATE)
                saved = self.step
        self.save(STATE)

    def _step(self, schedule: Schedule, capacity: int) -> StepStats:
        began = time.perf_counter()
        block = self.batches.step(self.step)
        weights = self.optimizer.weights
        result = forward(self.model, weights, block[:, :-1], capacity, self.run_layer)
        loss = head_loss(result.hidden, weights.embedding, block[:, 1:])
        penalty = self.config.balance_coefficient * result.balance + self.config.z_coefficient * result.z
        (loss + penalty).backward()  # type: ignore[no-untyped-call]
        if not torch.isfinite(loss):
            raise TrainingError(f"step {self.step}: the loss is {float(loss)}; lower --learning-rate")
        rate = schedule.rate(self.step)
        norm = self.optimizer.step(rate)
        self.step += 1
        taken = time.perf_counter() - began
        self.seconds += taken
        return StepStats(
            step=self.step,
            tokens=self.tokens_seen,
            loss=loss.item(),
            balance=result.balance.item() / self.model.layers,
            dropped=float(result.dropped.mean()),
            lowest_load=float(result.load.min()) * self.model.experts,
            grad_norm=norm,
            learning_rate=rate,
            tokens_per_second=self.config.tokens_per_step / taken,
            seconds=self.seconds,
        )

    @property
    def tokens_seen(self) -> int:
        """Training tokens behind the parameters."""
        return self.earlier_tokens + self.step * self.config.tokens_per_step

    def save(self, name: str = STATE) -> None:
        """Write a checkpoint: to a temporary file, flushed, renamed."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "earlier_tokens": self.earlier_tokens,
            "seconds": self.seconds,
            "config": asdict(self.config),
            "changes": self.changes,
            "model": asdict(self.model),
            "digest": self.corpus.digest,
            "optimizer": self.optimizer.state(),
        }
        atomic_write(self.run_dir / name, lambda path: torch.save(state, path))

    def _load(self, state: dict[str, Any]) -> None:
        if state["digest"] != self.corpus.digest:
            raise DataError(f"the corpus of {self.run_dir} has changed since the run began ({self.corpus.digest[:12]})")
        if state["model"] != asdict(self.model):
            raise TrainingError(f"{self.run_dir} trains a model of other sizes: {state['model']}")
        self.step, self.seconds = state["step"], state["seconds"]
        self.earlier_tokens = state["earlier_tokens"]
        now, old = asdict(self.config), state["config"]
        changed = {key: [old.get(key), now[key]] for key in now if now[key] != old.get(key)}
        self.changes = [*state.get("changes", []), *([{"step": self.step, **changed}] if changed else [])]
        self.optimizer.load_state(state["optimizer"])

    def export_to(self, folder: Path) -> None:
        """Export the current parameters."""
        export(self.model, self.optimizer.named, self.corpus.tokenizer, folder)


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint of `Trainer.save`. Raises TrainingError where there is none."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise TrainingError(f"no usable training state in {path}: {error}") from error
    return state


def old_steps(state: dict[str, Any]) -> int:
    """Steps of the schedule that a checkpoint was trained under."""
    return TrainConfig(**state["config"]).steps


def old_decay_begin(state: dict[str, Any]) -> int:
    """First decay step of that schedule."""
    return old_steps(state) - int(old_steps(state) * state["config"]["decay_share"])


def continued_config(state: dict[str, Any], **changes: Any) -> TrainConfig:
    """The configuration of a checkpoint with the given changes; None means unchanged."""
    return replace(
        TrainConfig(**state["config"]), **{key: value for key, value in changes.items() if value is not None}
    )


class LossCurve:
    """loss.jsonl: one line per `log_every` steps, means over them. Lines after the resumed step are dropped."""

    def __init__(self, path: Path, every: int, resumed_at: int) -> None:
        self.path, self.every = path, every
        self._pending: list[StepStats] = []
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= resumed_at] if resumed_at else []
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(f"{line}\n" for line in kept))

    def add(self, stats: StepStats) -> StepStats | None:
        """Take a step; returns the averaged line when one was written."""
        self._pending.append(stats)
        if stats.step % self.every:
            return None
        mean = self._mean()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: round(v, 6) for k, v in asdict(mean).items()}) + "\n")
        self._pending = []
        return mean

    def _mean(self) -> StepStats:
        last, count = self._pending[-1], len(self._pending)
        seconds = sum(1.0 / s.tokens_per_second for s in self._pending)
        return replace(
            last,
            loss=sum(s.loss for s in self._pending) / count,
            balance=sum(s.balance for s in self._pending) / count,
            dropped=sum(s.dropped for s in self._pending) / count,
            lowest_load=min(s.lowest_load for s in self._pending),
            tokens_per_second=count / seconds,
        )


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
