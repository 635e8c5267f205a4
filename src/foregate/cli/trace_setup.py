"""What ``foregate trace MODEL`` gets ready: the prompts, the model, and who they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foregate.config import RunConfig
from foregate.errors import ConfigError

if TYPE_CHECKING:
    from foregate.datasets.prompt import Dataset
    from foregate.trace.header import RunInfo
    from foregate.trace.models import TracedModel

HELD_OUT = "held-out"
"""Data set of this command alone: what the reference model's training never saw of its own sources."""


def find_prompts(name: str, data_dir: Path | None, split: str | None, domain: str | None, seed: int) -> Dataset:
    """The data set ``name``. Raises DatasetError or ConfigError."""
    from foregate.datasets.catalogue import open_dataset

    if name != HELD_OUT:
        return open_dataset(name, data_dir=data_dir, split=split, domain=domain, seed=seed)
    if domain is not None:
        raise ConfigError(f"data set {name!r} has domains of its own; leave --domain {domain} out")
    return _held_out(data_dir, split or "prose")


def _held_out(data_dir: Path | None, wanted: str) -> Dataset:
    """Documents of one domain of the reference model's corpus that it was not trained on, in passages."""
    from foregate.datasets.files import opened, passages
    from foregate.datasets.prompt import make_dataset
    from foregate.reference.corpus import documents, is_held_out, load_manifest

    manifest = load_manifest()
    domains = {domain.name: domain for domain in manifest.domains}
    if wanted not in domains:
        raise ConfigError(f"data set {HELD_OUT} has no split {wanted!r}; it has: {', '.join(domains)}")
    kept = [doc for doc in documents(domains[wanted], data_dir) if is_held_out(doc, manifest.held_out_share)]
    # One passage of each document, then the second of each: any limit covers all sources.
    pieces = [(number, doc.name, text) for doc in kept for number, text in enumerate(passages(doc.text))]
    prompts = [opened(f"{wanted}/{name}/{number:04d}", wanted, text) for number, name, text in sorted(pieces)]
    return make_dataset(HELD_OUT, prompts, "the reference model's corpus", split=wanted)


@contextmanager
def load_traced(config: RunConfig, resident: bool, template: str) -> Iterator[TracedModel]:
    """The model, ready; torch and transformers are imported here."""
    from foregate.engine.engine import Engine
    from foregate.trace.models import EngineModel

    if resident:
        yield _resident(config, template)
        return
    with Engine(config) as engine:
        yield EngineModel(engine, lambda text: engine.encode(text, template))


def _resident(config: RunConfig, template: str) -> TracedModel:
    import torch
    from transformers import AutoModelForCausalLM

    from foregate.checkpoint.locate import locate
    from foregate.checkpoint.opening import open_checkpoint
    from foregate.engine.model import load_tokenizer
    from foregate.engine.sampler import Sampler
    from foregate.engine.text import encode
    from foregate.trace.models import ResidentModel

    checkpoint = open_checkpoint(locate(config.model))
    if checkpoint.packed:
        raise ConfigError(f"{config.model} is a pack, which transformers cannot load; --resident needs the original")
    if config.threads:
        torch.set_num_threads(config.threads)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.directory, dtype=checkpoint.skeleton.dtype, local_files_only=True
    ).eval()
    tokenizer = load_tokenizer(checkpoint.directory)
    context = checkpoint.spec.context_length or 2**31

    def to_ids(text: str) -> list[int]:
        return encode(tokenizer, text, template=template, context=context)

    return ResidentModel(model, tokenizer, to_ids, context, lambda sampling: Sampler(sampling).choose)


def identity_of(tracked: Any, name: str) -> dict[str, str]:
    """Name and fingerprints of the loaded model, as ``RouterTracker.header`` takes them."""
    from foregate.engine.model import load_tokenizer
    from foregate.trace.identity import directory_fingerprint, tokenizer_fingerprint

    directory = Path(tracked.checkpoint.directory if hasattr(tracked, "checkpoint") else tracked.config._name_or_path)
    return {
        "name": Path(name).name if Path(name).is_dir() else name,
        "fingerprint": directory_fingerprint(directory),
        "tokenizer": tokenizer_fingerprint(load_tokenizer(directory)),
    }


def run_info(source: str, data: Dataset, settings: dict[str, Any], seed: int) -> RunInfo:
    """This run, as the header of a trace notes it."""
    from foregate.trace.header import RunInfo
    from foregate.trace.identity import software

    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return RunInfo(source, software(), seed, dict(data.origin), settings, created)
