"""The identity of a checkpoint: a hash of its config and of its tensor table, not of its weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from foregate.types import Segment

IGNORED_KEYS = ("_name_or_path", "transformers_version")
"""Keys of config.json that saving the same model again may change."""


def fingerprint(config: dict[str, Any], tensors: Iterable[Segment]) -> str:
    """32 hexadecimal digits, the same wherever the directory lies. Traces, predictors and packs carry it."""
    kept = {key: value for key, value in config.items() if key not in IGNORED_KEYS}
    digest = xxhash.xxh3_128(json.dumps(kept, sort_keys=True).encode())
    for tensor in sorted(tensors, key=lambda tensor: tensor.tensor):
        row = [tensor.tensor, tensor.dtype, tensor.shape, Path(tensor.path).name, tensor.offset]
        digest.update(json.dumps(row).encode())
    return str(digest.hexdigest())
