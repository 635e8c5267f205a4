"""Fingerprints of models and tokenizers, and the versions of the software at work."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foregate.checkpoint.fingerprint import IGNORED_KEYS, fingerprint
from foregate.checkpoint.manifest import is_pack, read_manifest
from foregate.checkpoint.model_config import read_config
from foregate.checkpoint.shards import read_shards
from foregate.trace.format import checksum

PACKAGES = ("foregate", "torch", "transformers", "tokenizers", "numpy", "pyarrow", "vllm")


def directory_fingerprint(directory: Path) -> str:
    """Of a checkpoint or its pack: both give the same. Raises CheckpointError. Reads headers, and samples weights."""
    if is_pack(directory):
        return read_manifest(directory).fingerprint
    raw = read_config(directory)
    return fingerprint(raw, read_shards(directory, raw.get("transformers_weights")).tensors.values())


def live_fingerprint(model: nn.Module) -> str:
    """Of a model that came from no directory: config, parameters and the ends of their values.

    Never equal to the fingerprint of a checkpoint.
    """
    config = getattr(model, "config", None)
    raw = config.to_dict() if config is not None else {}
    kept = {key: value for key, value in raw.items() if key not in IGNORED_KEYS}
    table = [[name, str(value.dtype), list(value.shape), _ends(value)] for name, value in model.named_parameters()]
    return checksum(json.dumps(["live", kept, table], sort_keys=True, default=str).encode())


def _ends(value: Tensor) -> list[float]:
    """The first and the last values of a parameter; none where it holds no values (meta)."""
    if value.is_meta:
        return []
    flat = value.detach().reshape(-1)
    return [float(number) for number in (*flat[:8], *flat[-8:])]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Of the vocabulary and the special tokens; 32 hexadecimal digits."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return checksum(json.dumps([sorted(tokenizer.get_vocab().items()), special], sort_keys=True).encode())


def software() -> dict[str, str]:
    """Versions that decide whether a trace can be repeated; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
