"""From what a user types to a checkpoint directory: the shipped reference model, a directory, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from foregate.checkpoint.jsonfile import parse
from foregate.checkpoint.reason import reason
from foregate.errors import CheckpointError

REFERENCE = "reference"
_REFERENCE_WEIGHTS = Path(__file__).parent.parent / "reference" / "weights"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


def locate(model: str) -> Path:
    """The directory of ``model``: ``reference``, an existing directory, or a hub id (downloaded into the hub cache).

    Raises CheckpointError, naming ``model``, if there is no such thing.
    """
    if not model.strip():
        raise CheckpointError("the name of the model is empty: no such directory")
    if model == REFERENCE:
        return _reference()
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise CheckpointError(f"{model} is a file; give the directory of a checkpoint")
    # "~nobody", and names that no file system takes
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{model[:100]}: no such directory ({reason(error)})") from error
    if not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise CheckpointError(f"{model}: no such directory")
    return _download(model)


def _reference() -> Path:
    if not (_REFERENCE_WEIGHTS / "config.json").is_file():
        raise CheckpointError(
            f"the reference model is not in this installation ({_REFERENCE_WEIGHTS} has no config.json)"
        )
    return _REFERENCE_WEIGHTS


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    def fetch(patterns: list[str]) -> Path:
        # "*/*" because patterns match across folders, and hubs keep second copies of the weights in sub-folders
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*/*"]))

    try:
        return fetch(_weights(fetch(list(_SMALL_FILES))) + list(_SMALL_FILES))
    # ConnectionError and the hub's own "not in the cache, and offline" are OSErrors; a malformed id is a ValueError
    except (HfHubHTTPError, OSError, ValueError) as error:
        message = f"{model} is neither a directory nor a model that the hub gives: {reason(error)}"
        raise CheckpointError(message) from error


def _weights(directory: Path) -> list[str]:
    """The safetensors files to download: those of the index, if there is one, so that no second copy comes along."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return sorted(set(parse(index.read_bytes())["weight_map"].values()))
    return ["model.safetensors"]
