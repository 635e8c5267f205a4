"""A prompt, a data set, and the error of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from foregate.errors import ForegateError


class DatasetError(ForegateError, ValueError):
    """A data set that is not there, is not what it should be, or is asked for something that it does not have."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked, and a known continuation (empty where there is none). ``id`` is unique in its data set."""

    id: str
    domain: str
    text: str
    reference: str = ""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Prompts in a fixed order. ``origin`` says which they are, down to a hash of every text."""

    name: str
    prompts: Sequence[Prompt]
    origin: Mapping[str, Any]


def make_dataset(name: str, prompts: Sequence[Prompt], source: str, **more: Any) -> Dataset:
    """A data set of ``prompts``. Raises DatasetError where there are none, or two have the same id."""
    if not prompts:
        raise DatasetError(f"{source}: no prompts in it")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DatasetError(f"{source}: the id {prompt.id!r} is there twice")
        seen.add(prompt.id)
    digest = xxhash.xxh3_128()
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.domain, prompt.text, prompt.reference]).encode())
    origin = {"name": name, "source": source, **more, "prompts": len(prompts), "xxh3": digest.hexdigest()}
    return Dataset(name, prompts, origin)
