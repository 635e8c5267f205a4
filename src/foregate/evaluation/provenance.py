"""What predictor files were trained on, checked against the prompts that they are to be judged on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from foregate.errors import PredictorError
from foregate.evaluation.candidates import Candidate, split_lookahead
from foregate.evaluation.held_out import HeldOut
from foregate.predictors.choice import is_file
from foregate.predictors.file import Artifact, load
from foregate.trace.manifest import Entry
from foregate.training.dataset import TEST, TRAIN, content_hash, side

BY_PROMPTS, BY_HASH = "its list of prompts", "the hash of its training data"
MOST_TRACES = 8
"""With more traces, a hash is compared with that of each, and of all together, not with that of every selection."""


def provenance(candidate: Candidate, held: HeldOut) -> dict[str, Any]:
    """What its files say about their training, and what of that is true of ``held``; empty where there is no file.

    ``training`` has one entry a file: ``verified_by`` (None: nobody can know that it never saw these prompts) and, for
    each domain, the share of the prompts on the training side of the given traces that it was trained on.
    Raises PredictorError for a file of another model, and one that was trained on a prompt that is evaluated.
    """
    texts = [split_lookahead(member)[0] for member in candidate.members]
    files = [load(Path(text).expanduser()) for text in texts if is_file(text)]
    if not files:
        return {}
    for file in files:
        file.check_model(held.identity)
    return {
        "trained_on": sorted({name for file in files for name in file.traces}),
        "trace_hash": [file.trace_hash for file in files],
        "seed": [file.seed for file in files],
        "features": sorted({name for file in files for name in file.features}),
        "training": [check_training(file, held) for file in files],
    }


def check_training(file: Artifact, held: HeldOut) -> dict[str, Any]:
    """One entry of ``training``, see ``provenance``."""
    known: Collection[str] | None = file.prompts
    verified: str | None = BY_PROMPTS
    if not known:
        known, verified = _by_hash(file, held), BY_HASH
    if known is None:
        return {"verified_by": None, "of_domain": None}
    evaluated = {entry.content: entry.prompt for _, entry in held.items}
    seen = sorted(evaluated[content] for content in evaluated.keys() & set(known))
    if seen:
        raise PredictorError(
            f"{file.path}: trained on {len(seen)} of the {len(evaluated)} prompts that are evaluated, such as "
            f"{seen[0]}: it cannot be judged on them"
        )
    return {"verified_by": verified, "of_domain": _shares(set(known), [entry for _, entry in held.found])}


def _by_hash(file: Artifact, held: HeldOut) -> set[str] | None:
    """Contents that ``file.trace_hash`` is the hash of: the training side of some of the traces, or all of theirs."""
    if not file.trace_hash:
        return None
    for traces in _selections(held):
        for entries in ([e for e in traces if side(e) == TRAIN], [e for e in traces if side(e) == TEST], traces):
            if entries and content_hash(entries) == file.trace_hash:
                return {entry.content for entry in entries}
    return None


def _selections(held: HeldOut) -> Iterator[list[Entry]]:
    """Entries of every selection of traces, each file once."""
    number = len(held.readers)
    sizes = range(1, number + 1) if number <= MOST_TRACES else (1, number)
    for size in sizes:
        for readers in combinations(held.readers, size):
            yield list({entry.part.xxh3: entry for reader in readers for entry in reader.entries}.values())


def _shares(known: Collection[str], entries: Sequence[Entry]) -> dict[str, float]:
    """Domain → share of its training prompts that are ``known``; a domain that has none is left out."""
    sides: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if side(entry) == TRAIN:
            sides[entry.domain].add(entry.content)
    return {domain: round(len(some & set(known)) / len(some), 4) for domain, some in sides.items()}


def training_lines(result: Mapping[str, Any]) -> list[str]:
    """For people: what the judged files were trained on, those alike in one line."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, one in result["predictors"].items():
        for entry in one.get("training", ()):
            names = alike[_line(entry)]
            names += [name] if name not in names else []
    return [f"{line}: {', '.join(names)}" for line, names in alike.items()]


def _line(entry: Mapping[str, Any]) -> str:
    if entry["verified_by"] is None:
        return (
            "warning: training data neither listed nor that of the given traces, so that none of the prompts was seen "
            "in training cannot be verified"
        )
    shares = [f"{domain} {share:.0%}" for domain, share in entry["of_domain"].items()]
    found = f"of the training prompts here it saw {', '.join(shares)}" if shares else "no training prompts here"
    return f"trained on none of the evaluated prompts (by {entry['verified_by']}); {found}"
