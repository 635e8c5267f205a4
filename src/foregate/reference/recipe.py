"""The whole recipe in one call: corpus, training, exports, evaluation, model card. The CLI only adds a display."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from foregate.errors import ForegateError
from foregate.reference.card import write_card
from foregate.reference.corpus import SHIPPED_MANIFEST, load_manifest
from foregate.reference.data import Corpus, build_corpus, load_corpus
from foregate.reference.evaluate import evaluate
from foregate.reference.export import read_model_config
from foregate.reference.figures import training_figures
from foregate.reference.files import write_json
from foregate.reference.model import ModelConfig
from foregate.reference.train import (
    CURVE,
    STATE,
    Interrupt,
    LossCurve,
    StepStats,
    TrainConfig,
    Trainer,
    continued_config,
    read_state,
)

WEIGHTS = Path(__file__).with_name("weights")
FIGURES = "training.json"


@dataclass(frozen=True)
class Request:
    """What the user asked for. None means: the default, or on resume, whatever the run was started with."""

    data_dir: Path | None = None
    manifest: Path = SHIPPED_MANIFEST
    run_dir: Path | None = None
    output: Path | None = None
    resume: bool = False
    threads: int = 0
    tokens: int | None = None
    seed: int | None = None
    learning_rate: float | None = None
    capacity_factor: float | None = None
    compile: str | None = None

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.run_dir or default_run_dir()

    @property
    def model_folder(self) -> Path:
        """Where the model is exported to."""
        return self.output or self.folder / "model"

    def changes(self) -> dict[str, Any]:
        """The settings that were given."""
        return {
            "tokens": self.tokens,
            "seed": self.seed,
            "learning_rate": self.learning_rate,
            "capacity_factor": self.capacity_factor,
            "compile": self.compile,
        }


class RequestError(ForegateError, ValueError):
    """Settings that contradict each other or the run that they should continue."""


def default_run_dir() -> Path:
    """Below the XDG state directory."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "foregate" / "reference"


def use_threads(threads: int) -> None:
    """Set torch's threads (0: as many as cores) and flush denormals, which slow a CPU down a hundredfold."""
    if threads < 0:
        raise RequestError(f"threads {threads} is negative")
    torch.set_num_threads(threads or os.cpu_count() or 1)
    torch.set_flush_denormal(True)


def prepare(request: Request, say: Callable[[str], None], model: ModelConfig | None = None) -> Trainer:
    """A trainer that is ready to run: fresh, resumed, or started from the shipped weights."""
    use_threads(request.threads)
    exists = (request.folder / STATE).exists()
    if exists and not request.resume:
        raise RequestError(
            f"{request.folder} holds a run already; --resume continues it, another --run-dir starts anew"
        )
    if exists:
        return _resume(request, say)
    if request.resume:
        return _from_weights(request, say)
    size = model or ModelConfig()
    corpus = _corpus(request, say, size.vocab_size, None)
    return Trainer(size, continued_config({"config": {}}, **request.changes()), corpus, request.folder)


def _resume(request: Request, say: Callable[[str], None]) -> Trainer:
    state = read_state(request.folder / STATE)
    for name in ("seed", "learning_rate"):
        asked = getattr(request, name)
        if asked is not None and asked != state["config"][name]:
            raise RequestError(
                f"{name} {asked} differs from the run's {state['config'][name]}; --resume cannot change it"
            )
    config = continued_config(
        state, tokens=request.tokens, compile=request.compile, capacity_factor=request.capacity_factor
    )
    corpus = load_corpus(request.folder / "corpus")
    trainer = Trainer.resumed(ModelConfig(**state["model"]), config, corpus, request.folder)
    say(f"resumed at step {trainer.step} of {config.steps}")
    if trainer.step < state["step"]:
        say(
            f"the run had decayed already; its constant phase continues from step {trainer.step} instead of "
            f"{state['step']}"
        )
    return trainer


def _from_weights(request: Request, say: Callable[[str], None]) -> Trainer:
    model = read_model_config(WEIGHTS)
    seen = int(read_figures(WEIGHTS)["training"]["tokens"])
    corpus = _corpus(request, say, model.vocab_size, Tokenizer.from_file(str(WEIGHTS / "tokenizer.json")))
    say(
        f"no run in {request.folder}: starting from the shipped weights ({seen} tokens) with a new, re-warmed optimizer"
    )
    # Another seed than the run's that made the weights: the texts come in a new order.
    config = continued_config({"config": {"seed": seen}}, **request.changes())
    return Trainer.from_weights(model, config, corpus, request.folder, WEIGHTS, seen)


def _corpus(request: Request, say: Callable[[str], None], vocab_size: int, tokenizer: Tokenizer | None) -> Corpus:
    say(f"reading the corpus of {request.manifest}")
    manifest = load_manifest(request.manifest)
    corpus = build_corpus(manifest, request.data_dir, request.folder / "corpus", vocab_size, tokenizer)
    for domain in corpus.domains:
        say(
            f"{domain.name}: {domain.documents} documents, {len(domain.train)} tokens; "
            f"held out: {domain.held_out_documents} documents, {len(domain.held_out)} tokens"
        )
    return corpus


def train(request: Request, trainer: Trainer, interrupt: Interrupt) -> Iterator[StepStats]:
    """Run a prepared trainer, write the loss curve, export every `export_every` tokens; yields averaged statistics."""
    curve = LossCurve(request.folder / CURVE, trainer.config.log_every, trainer.step)
    due = next_export(trainer.tokens_seen, trainer.config)
    for stats in trainer.run(interrupt):
        mean = curve.add(stats)
        if mean is not None:
            yield mean
        if stats.tokens >= due:
            trainer.export_to(request.model_folder)
            due = next_export(stats.tokens, trainer.config)


def next_export(tokens: int, config: TrainConfig) -> int:
    """Tokens at the next intermediate export: one after the first checkpoint, then at multiples of `export_every`."""
    if tokens < config.save_every:
        return config.save_every
    return (tokens // config.export_every + 1) * config.export_every


def finish(request: Request, trainer: Trainer, say: Callable[[str], None], tokens: int = 20_000) -> Path:
    """Export, evaluate the export, write training.json and the model card. Returns the folder."""
    folder = request.model_folder
    trainer.export_to(folder)
    say(f"exported to {folder}; evaluating")
    figures = training_figures(trainer, load_manifest(request.manifest), folder, request.folder / CURVE)
    figures["evaluation"] = evaluate(folder, trainer.corpus, trainer.config.length, tokens).as_json()
    write_json(folder / FIGURES, figures)
    write_card(folder, figures)
    return folder


def read_figures(folder: Path) -> dict[str, Any]:
    """The training.json of an exported model."""
    try:
        figures: dict[str, Any] = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder / FIGURES} cannot be read: {error}") from error
    return figures
