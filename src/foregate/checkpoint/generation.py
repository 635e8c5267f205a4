"""generation_config.json: optional, but not junk. transformers reads it while it loads the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foregate.checkpoint.jsonfile import parse
from foregate.errors import CheckpointError

NAME = "generation_config.json"


def check_generation_config(directory: Path) -> None:
    """Raises CheckpointError naming the file where it is there and is not an object, or has no usable end tokens."""
    path = directory / NAME
    try:
        content = parse(path.read_bytes())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON {type(content).__name__}, not an object")
    end = content.get("eos_token_id")
    if end is not None and not all(_is_id(value) for value in (end if isinstance(end, list) else [end])):
        raise CheckpointError(f"{path}: eos_token_id is {str(end)[:100]!r}, neither a token id nor a list of them")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
