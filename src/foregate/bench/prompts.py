"""What is generated while time is taken: a few real prompts of each domain, or the user's own; any exact length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from foregate.datasets.catalogue import BENCHMARKS, open_dataset
from foregate.errors import ConfigError

BUILT_IN = {
    "mathematics": "Question: Natalia sold 48 clips in April and half as many in May. "
    "How many clips did she sell in all?\nAnswer:",
    "code": "def read_settings(path, default=None):\n"
    '    """Read a settings file and return its values as a dictionary."""\n',
    "prose": "The install command copies files to their final place. It takes the name of a directory and",
}
"""Used where no data set is named: nothing has to be downloaded."""

LONG = {"code": "argparse", "prose": "pydoc_data.topics"}
"""Domain → module of the standard library whose source is the text of built-in prompts of a given length."""

CHARACTERS = (6, 24, 96)
"""Of text that are tried for each token wanted: encoding a whole book for 64 tokens would take long."""

Encode = Callable[[str], list[int]]


def load_prompts(encode: Encode, datasets: Sequence[str], data_dir: Path | None, each: int) -> dict[str, list[int]]:
    """Name (domain/id) → token ids: ``each`` prompts of every data set, or the built-in ones. Raises DatasetError."""
    if not datasets:
        return {name: encode(text) for name, text in BUILT_IN.items()}
    found: dict[str, list[int]] = {}
    for name in datasets:
        for prompt in _texts(name, data_dir)[:each]:
            found[f"{prompt[0]}/{prompt[1]}"] = encode(prompt[2])
    return found


def exact_prompts(
    encode: Encode, datasets: Sequence[str], data_dir: Path | None, lengths: Sequence[int]
) -> dict[str, list[int]]:
    """Name (domain/length) → exactly that many token ids: a domain's texts one after the other, cut.

    Raises ConfigError where a domain has too little text.
    """
    texts: dict[str, list[str]] = {}
    for name in datasets:
        for domain, _, text in _texts(name, data_dir):
            texts.setdefault(domain, []).append(text)
    if not datasets:
        texts = {domain: [_source(module)] for domain, module in LONG.items()}
    return {
        f"{domain}/{length}": _cut(encode, own, length, domain) for domain, own in texts.items() for length in lengths
    }


def parse_lengths(text: str) -> list[int]:
    """``64,512`` → the numbers. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise ConfigError(f"prompt tokens {part!r} must be a whole number from 1 on")
    if not parts:
        raise ConfigError(f"prompt tokens {text!r} names none")
    return [int(part) for part in parts]


def _texts(name: str, data_dir: Path | None) -> list[tuple[str, str, str]]:
    """(domain, id, text) of every prompt."""
    local = data_dir if name in (*BENCHMARKS, "sharegpt") else None
    return [(prompt.domain, prompt.id, prompt.text) for prompt in open_dataset(name, data_dir=local).prompts]


def _cut(encode: Encode, texts: Sequence[str], length: int, domain: str) -> list[int]:
    for enough in CHARACTERS:
        so_far = ""
        for text in texts:
            so_far += text + "\n"
            if len(so_far) >= enough * length:
                break
        ids = encode(so_far[: enough * length])
        if len(ids) >= length:
            return ids[:length]
    raise ConfigError(f"domain {domain!r} has no text of {length} tokens; name a longer data set")


def _source(module: str) -> str:
    spec = find_spec(module)
    if spec is None or not spec.origin:
        raise ConfigError(f"Python's module {module} has no source here; name a data set")
    return Path(spec.origin).read_text(encoding="utf-8")
