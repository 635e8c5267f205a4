"""Rows of a source as dicts: a JSONL file (plain or gzipped), a JSON list, or a data set of the hub."""

from __future__ import annotations

import gzip
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foregate.datasets.prompt import DatasetError

Row = dict[str, Any]


def read_text(path: Path) -> str:
    """The text of a file, unpacked if its name ends in .gz. Raises DatasetError naming the file."""
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read as text ({error})") from None


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Objects of a JSONL file. Raises DatasetError with the number of the line."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield _object(line, f"{path}:{number}")


def json_rows(path: Path) -> list[Row]:
    """Objects of a JSON list. Raises DatasetError."""
    try:
        rows = json.loads(read_text(path))
    except ValueError as error:
        raise DatasetError(f"{path}: not JSON ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DatasetError(f"{path}: a list of JSON objects was expected")
    return rows


def hub_rows(dataset: str, config: str | None, split: str) -> Iterator[Row]:
    """Rows of a data set of the hub. Raises DatasetError; needs the package ``datasets``."""
    try:
        hub = importlib.import_module("datasets")
    except ImportError:
        message = f"{dataset} is on the hub: pip install datasets, or give a local copy with --data-dir"
        raise DatasetError(message) from None
    try:
        for row in hub.load_dataset(dataset, config, split=split):
            yield dict(row)
    # what the package raises for absent data sets, configs, splits and networks
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DatasetError(f"{dataset} ({split}) cannot be had from the hub: {reason}") from error


def text_of(row: Row, name: str, where: str) -> str:
    """A field that must be text. Raises DatasetError."""
    value = row.get(name)
    if not isinstance(value, str):
        raise DatasetError(f"{where}: no text under {name!r}; it has {', '.join(sorted(row)) or 'nothing'}")
    return value


def _object(line: str, where: str) -> Row:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DatasetError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DatasetError(f"{where}: a JSON object was expected")
    return value
