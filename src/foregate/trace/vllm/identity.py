"""Which model a vLLM worker has loaded, as the header of a trace says it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from foregate import __version__
from foregate.checkpoint.locate import locate
from foregate.trace.header import Header, ModelInfo, RunInfo, ScoreInfo
from foregate.trace.identity import directory_fingerprint, software, tokenizer_fingerprint
from foregate.trace.vllm.layers import LayerShape
from foregate.trace.vllm.versions import reach, vllm_version

SOURCE = "vllm"
_SUFFIX = re.compile(r"-[0-9a-f]{8}$")


def external_id(request: str) -> str:
    """The id under which a request was made: vLLM appends eight hexadecimal digits to it."""
    return _SUFFIX.sub("", request)


def model_info(config: Any, layers: Sequence[LayerShape], name: str = "") -> ModelInfo:
    """From a ``VllmConfig``. ``name`` is what the user calls the model. Raises CheckpointError, TraceError."""
    model = reach(config, "model_config")
    directory = locate(str(model.model))
    return ModelInfo(
        name=name or (Path(model.model).name if Path(model.model).is_dir() else str(model.model)),
        fingerprint=directory_fingerprint(directory),
        model_type=str(reach(model, "hf_text_config.model_type")),
        dtype=str(model.dtype).removeprefix("torch."),
        hidden_size=int(model.get_hidden_size()),
        moe_layers=tuple(layer.number for layer in layers),
        experts_per_layer=tuple(layer.experts for layer in layers),
        top_k=tuple(layer.top_k for layer in layers),
        tokenizer=_tokenizer(directory),
    )


def header(model: ModelInfo, run: RunInfo, *, scores: bool, timings: Sequence[str]) -> Header:
    """Of a trace of ``model``; vLLM's routers are given logits."""
    kind = ScoreInfo(max(model.experts_per_layer), "logits") if scores else None
    return Header(model, (run,), kind, tuple(timings))


def run_info(seed: int, dataset: dict[str, Any], settings: dict[str, Any]) -> RunInfo:
    """This run, now."""
    versions = software() | {"foregate": __version__, "vllm": vllm_version()}
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return RunInfo(SOURCE, versions, seed, dataset, settings, created)


def _tokenizer(directory: Path) -> str:
    """Fingerprint of the tokenizer in ``directory``; empty where there is none."""
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return ""
    return tokenizer_fingerprint(AutoTokenizer.from_pretrained(directory, local_files_only=True))
