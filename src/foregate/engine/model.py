"""A transformers model with its dense weights loaded and its experts left on ``meta``."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from foregate.checkpoint.dense_int8 import replace_linears, replaced
from foregate.checkpoint.opening import Checkpoint
from foregate.checkpoint.verify import verify_dense
from foregate.errors import CheckpointError


def load_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Load everything but the experts, the ordinary way. Raises CheckpointError where dense weights are missing."""
    verify_dense(checkpoint)
    bare: Any = _without_experts(checkpoint)
    with _quiet():
        model, info = bare.from_pretrained(
            checkpoint.directory, dtype=checkpoint.skeleton.dtype, local_files_only=True, output_loading_info=True
        )
    missing = sorted(info["missing_keys"]) + sorted(str(item[0]) for item in info["mismatched_keys"])
    if missing:
        raise CheckpointError(f"{checkpoint.directory}: weights missing or of wrong shape: {', '.join(missing[:4])}")
    loaded: PreTrainedModel = model.eval()
    _own_memory(loaded)
    _drop_page_cache(checkpoint.directory)
    return loaded


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's own tokenizer. Raises CheckpointError when there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{path}: no usable tokenizer: {str(error).splitlines()[0]}") from error
    if not tokenizer("a").input_ids:
        # Without files transformers makes an empty tokenizer of the family's class.
        raise CheckpointError(f"{path}: no usable tokenizer: its vocabulary is empty")
    return tokenizer


def stop_ids(model: PreTrainedModel) -> set[int]:
    """Tokens that end a text: the generation config's, else the model's own; empty where neither names any."""
    configs = (model.generation_config, model.config)
    ends: Any = next((c.eos_token_id for c in configs if getattr(c, "eos_token_id", None) is not None), [])
    return set(ends) if isinstance(ends, (list, tuple)) else {int(ends)}


def takes_logits_to_keep(model: type[nn.Module]) -> bool:
    """Whether its forward can compute the logits of the last positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _without_experts(checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """The model's own class, except that expert parameters are plain ``meta`` tensors that nobody loads.

    Name and module stay, because transformers looks conversions up by class name.
    """
    base = type(checkpoint.skeleton.model)
    int8 = list(replaced(checkpoint.skeleton.model))
    hidden = {module.path: list(module.params) for module in checkpoint.skeleton.moe}

    def initialise(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        for path, names in hidden.items():
            _hide(self.get_submodule(path), names)
        replace_linears(self, int8)

    ignored = [rf"^(?:.*\.)?{re.escape(path)}\." for path in hidden] + [r"\.experts\."]
    body = {"__init__": initialise, "__module__": base.__module__, "_keys_to_ignore_on_load_unexpected": ignored}
    return type(base.__name__, (base,), body)


def _hide(module: nn.Module, names: list[str]) -> None:
    for name in names:
        parameter = module._parameters.pop(name)
        object.__setattr__(module, name, parameter)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no load report from transformers: the engine speaks for itself."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _own_memory(model: nn.Module) -> None:
    """Copy every tensor out of the mapped file, tensor by tensor; tied ones stay tied.

    transformers leaves them on a mapping of the file: memory that no budget sees, whose read-ahead brings experts into
    the page cache, and which kills the process if the file changes.
    """
    copies: dict[int, torch.Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type != "meta" and tensor.numel():
            storage = tensor.data_ptr()
            if storage not in copies:
                copies[storage] = tensor.detach().clone()
            tensor.data = copies[storage].view_as(tensor)


def _drop_page_cache(path: Path) -> None:
    """Forget the file's pages: nothing maps them any more."""
    for file in path.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
