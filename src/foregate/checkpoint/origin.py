"""What a checkpoint was inflated from: such a copy routes every token as its original does (docs/inflation.md)."""

from __future__ import annotations

from pathlib import Path

from foregate.checkpoint.jsonfile import parse
from foregate.errors import CheckpointError

INFLATION_FILE = "inflation.json"


def original_fingerprint(directory: Path) -> str:
    """Fingerprint of the original of the inflated checkpoint (or its pack) in ``directory``; empty if it is none.

    Raises CheckpointError where the file that says so is damaged.
    """
    path = directory / INFLATION_FILE
    if not path.is_file():
        return ""
    try:
        found = parse(path.read_bytes())["source_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: no fingerprint of the original ({error})") from error
    if not isinstance(found, str):
        raise CheckpointError(f"{path}: damaged: the fingerprint of the original is {found!r}")
    return found
