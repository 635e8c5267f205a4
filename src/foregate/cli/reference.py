"""`foregate reference`: train the small MoE that ships with Foregate, or continue, evaluate and describe it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from foregate.reference.recipe import Request
    from foregate.reference.train import StepStats, Trainer

app = typer.Typer(help="The reference model: train, continue, evaluate, describe.", no_args_is_help=True)
console = Console(stderr=True)

DataDir = Annotated[Path | None, typer.Option(help="Where the manifest's relative paths are, e.g. gsm8k_train.jsonl.")]
ManifestFile = Annotated[Path | None, typer.Option(help="Corpus manifest, .json or .toml. Default: the shipped one.")]
RunDir = Annotated[Path | None, typer.Option(help="Checkpoints and tokens. Default: below the XDG state directory.")]
Threads = Annotated[int, typer.Option(help="Threads of torch; 0 means one a core.", min=0)]


@app.command()
def train(
    data_dir: DataDir = None,
    manifest: ManifestFile = None,
    run_dir: RunDir = None,
    output: Annotated[Path | None, typer.Option(help="Exported model. Default: RUN_DIR/model.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Length of the whole schedule in tokens.", min=1)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run, or the shipped weights.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and data order.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.", min=0.0)] = None,
    capacity_factor: Annotated[float | None, typer.Option(help="Rows of an expert, x uniform.", min=0.1)] = None,
    compile: Annotated[str | None, typer.Option(help="torch.compile: auto, on or off.")] = None,
    threads: Threads = 0,
) -> None:
    """Train from a corpus manifest; SIGINT or SIGTERM saves and exits, --resume continues bit for bit."""
    _wait_passively()
    from foregate.reference.recipe import finish, prepare
    from foregate.reference.recipe import train as run
    from foregate.reference.train import Interrupt

    request = _request(
        data_dir,
        manifest,
        run_dir,
        output=output,
        resume=resume,
        threads=threads,
        tokens=tokens,
        seed=seed,
        learning_rate=learning_rate,
        capacity_factor=capacity_factor,
        compile=compile,
    )
    trainer = prepare(request, console.print)
    with Interrupt().installed() as interrupt, _display(trainer) as show:
        for stats in run(request, trainer, interrupt):
            show(stats)
    if trainer.step < trainer.config.steps:
        console.print(f"stopped at step {trainer.step} of {trainer.config.steps}; --resume continues")
        raise typer.Exit(130)
    console.print(f"done: {finish(request, trainer, console.print)}")


@app.command()
def corpus(data_dir: DataDir = None, manifest: ManifestFile = None) -> None:
    """Read every source of a manifest and show what it yields; trains nothing."""
    from foregate.reference.corpus import documents, is_held_out, load_manifest

    request = _request(data_dir, manifest, None)
    described = load_manifest(request.manifest)
    for domain in described.domains:
        for source in domain.sources:
            docs = list(documents(replace(domain, sources=(source,)), data_dir))
            held_out = sum(is_held_out(doc, described.held_out_share) for doc in docs)
            size = sum(len(doc.text) for doc in docs)
            title = source.title or source.dataset or source.path
            typer.echo(f"{domain.name}: {title}: {len(docs)} documents, {held_out} held out, {size} characters")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="An exported model.")],
    run_dir: RunDir = None,
    tokens: Annotated[int, typer.Option(help="Held-out tokens per domain.", min=256)] = 20_000,
    threads: Threads = 0,
) -> None:
    """Held-out loss, expert load and samples of an exported model, as JSON."""
    import json

    from foregate.reference.data import load_corpus
    from foregate.reference.evaluate import evaluate as measure
    from foregate.reference.recipe import use_threads

    use_threads(threads)
    held_out = load_corpus(_request(None, None, run_dir).folder / "corpus")
    typer.echo(json.dumps(measure(model, held_out, tokens=tokens).as_json(), indent=2))


@app.command()
def card(model: Annotated[Path, typer.Argument(help="An exported model with its training.json.")]) -> None:
    """Write the model card (README.md) anew from training.json."""
    from foregate.reference.card import write_card
    from foregate.reference.recipe import read_figures

    write_card(model, read_figures(model))


@app.command()
def speed(
    minutes: Annotated[float, typer.Option(help="Time that a training may take.", min=1.0)] = 60.0,
    threads: Threads = 0,
) -> None:
    """Measure tokens per second, eager and compiled, and suggest --tokens for the given time."""
    _wait_passively()
    from foregate.reference.model import ModelConfig
    from foregate.reference.recipe import use_threads
    from foregate.reference.speed import tokens_for, tokens_per_second
    from foregate.reference.train import TrainConfig

    use_threads(threads)
    for choice in ("off", "auto"):
        rate = tokens_per_second(ModelConfig(), TrainConfig(compile=choice))
        typer.echo(f"compile {choice}: {rate:.0f} tokens/s; {minutes:g} minutes: --tokens {tokens_for(minutes, rate)}")


def _wait_passively() -> None:
    """Let OpenMP threads sleep at barriers (torch must not be loaded yet). On two shared cores, spinning cost 5x."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _request(data_dir: Path | None, manifest: Path | None, run_dir: Path | None, **settings: object) -> Request:
    from foregate.reference.recipe import Request

    request = Request(data_dir=data_dir, run_dir=run_dir, **settings)  # type: ignore[arg-type]
    return replace(request, manifest=manifest) if manifest else request


class _Display:
    """Progress on a terminal; a line every hundred steps elsewhere."""

    def __init__(self, trainer: Trainer, progress: Progress) -> None:
        self.trainer, self.progress = trainer, progress
        self.task = progress.add_task("training", total=trainer.config.steps, completed=trainer.step, figures="")

    def __call__(self, stats: StepStats) -> None:
        figures = (
            f"loss {stats.loss:.3f}  balance {stats.balance:.3f}  dropped {stats.dropped:.2%}  "
            f"{stats.tokens_per_second:.0f} tok/s"
        )
        self.progress.update(self.task, completed=stats.step, figures=figures)
        if not console.is_terminal and stats.step % 100 == 0:
            console.print(f"step {stats.step}/{self.trainer.config.steps}  {stats.tokens} tokens  {figures}")


@contextmanager
def _display(trainer: Trainer) -> Iterator[_Display]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield _Display(trainer, progress)
