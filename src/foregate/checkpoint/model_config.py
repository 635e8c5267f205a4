"""config.json as a transformers config, and what it says about dtype and quantisation. Custom code never runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from foregate.checkpoint.dtypes import FLOATS
from foregate.checkpoint.jsonfile import parse
from foregate.checkpoint.reason import reason
from foregate.checkpoint.shards import Shards
from foregate.errors import CheckpointError, UnsupportedModelError

INVALID = (
    StrictDataclassError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ImportError,
    OSError,
    ZeroDivisionError,
    RecursionError,
)
"""What transformers raises for a config that it does not know, or whose values do not fit."""


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it lies in ``directory``. Raises CheckpointError naming the file."""
    path = directory / "config.json"
    try:
        content = parse(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file is missing; {directory} is not a checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise CheckpointError(f"{path}: no model_type")
    _refuse_quantised(content)
    return content


def text_config(directory: Path, raw: dict[str, Any]) -> PretrainedConfig:
    """The config that the causal language model is built from; of a multimodal one, its text part.

    Raises UnsupportedModelError, naming the model type, if transformers has no causal language model for it.
    """
    model_type = raw["model_type"]
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except INVALID as error:
        raise UnsupportedModelError(f"model type {model_type!r} of {directory}/config.json: {reason(error)}") from error
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        message = f"model type {model_type!r} is not supported: transformers has no causal language model for it"
        raise UnsupportedModelError(message)
    text_class = config.sub_configs.get("text_config")
    wanted = getattr(mapping[type(config)], "config_class", None)
    chosen: PretrainedConfig = config.get_text_config() if text_class is not None and wanted is text_class else config
    return chosen


def model_dtype(config: PretrainedConfig, shards: Shards) -> torch.dtype:
    """What ``from_pretrained(dtype="auto")`` loads the model in: the config's dtype, else that of the first weight."""
    said = config.dtype if config.dtype is not None else shards.metadata.get("dtype")
    if said is None:
        first = str(shards.files[0])
        stored = (tensor.dtype for _, tensor in sorted(shards.tensors.items()) if tensor.path == first)
        return next((FLOATS[name] for name in stored if name in FLOATS), torch.float32)
    dtype = getattr(torch, said, None) if isinstance(said, str) else said
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS.values():
        message = f"model type {config.model_type!r} has dtype {said}"
        raise UnsupportedModelError(f"{message}; supported: {', '.join(FLOATS)}")
    return dtype


def _refuse_quantised(raw: dict[str, Any]) -> None:
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        quantisation = part.get("quantization_config") or part.get("compression_config")
        if quantisation:
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
            message = f"model type {raw['model_type']!r} is quantised with {method or 'an unnamed method'}"
            raise UnsupportedModelError(f"{message}; dequantise the checkpoint first (save it as bfloat16)")
