"""Measurements kept in a directory, so that a run that was cut short measures only what is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

import foregate
from foregate.errors import ConfigError


class Kept:
    """``directory`` None: nothing is kept.

    What is kept is found again under its name only where everything that it depends on is the same: the identity,
    and the code of Foregate, compiled parts included.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def measured(self, name: str, identity: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was kept of this measurement, else what ``measure`` gives, kept. Raises ConfigError."""
        if self._directory is None:
            return measure()
        file = self._file(name, identity)
        if file.is_file():
            return _read(file)
        found = measure()
        self._write(file, found)
        return found

    def has(self, name: str, identity: Mapping[str, Any]) -> bool:
        """Whether ``measured`` would measure nothing."""
        return self._directory is not None and self._file(name, identity).is_file()

    def _file(self, name: str, identity: Mapping[str, Any]) -> Path:
        assert self._directory is not None
        known = json.dumps({**identity, "code": code_hash()}, sort_keys=True)
        safe = "".join(char if char.isalnum() or char in "%.-" else "_" for char in name)
        return self._directory / f"{safe}-{xxhash.xxh3_64(known.encode()).hexdigest()}.json"

    def _write(self, file: Path, found: Mapping[str, Any]) -> None:
        """Whole or not at all, whenever the machine stops."""
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".part")
        with beside.open("w") as out:
            json.dump(found, out)
            out.flush()
            os.fsync(out.fileno())
        beside.rename(file)


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not a kept measurement ({error}); remove it to measure again") from error


@cache
def code_hash() -> str:
    """Of everything in this package that runs: another version must not pass for this one's measurement."""
    root, digest = Path(foregate.__file__).parent, xxhash.xxh3_128()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".c", ".h", ".so"):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
