"""The program that runs a model offloaded by accelerate: ``… OFFLOADED TOKENS.json --threads 2``.

Layers are resident in their order while they fit the memory limit of this process's control group; the others are
mapped from their files whenever they run, as accelerate does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from foregate.bench.rivals.disk_offload import INDEX
from foregate.bench.rivals.memory_limit import memory_limit
from foregate.bench.rivals.outcome import Feed, measure, peak_rss, read_tokens
from foregate.errors import CheckpointError, ConfigError, ForegateError

BESIDE_BYTES = 512 << 20
"""Kept free for activations, the key/value cache and the pages under the layer that runs."""


def resident_memory(limit: int | None) -> dict[str, int] | None:
    """accelerate's ``max_memory``: nothing resident where the limit has no room for more; None without a limit.

    Raises ConfigError if the limit is below what is in use.
    """
    if limit is None:
        return None
    used = peak_rss()
    if limit < used:
        raise ConfigError(f"a memory limit of {limit} bytes is below the {used} bytes of torch alone")
    return {"cpu": max(0, limit - used - BESIDE_BYTES)}


class Offloaded:
    """The model with accelerate's hooks, and its key/value cache. ``placed``: device → number of parts."""

    def __init__(self, directory: Path, limit: int | None) -> None:
        import torch
        from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

        kept = _index(directory)
        config = AutoConfig.from_pretrained(kept["model"])
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.tie_weights()
        whole = model._no_split_modules
        places = infer_auto_device_map(model, max_memory=resident_memory(limit), no_split_module_classes=list(whole))
        _load_resident(model, places, kept["index"])
        model.tie_weights()
        offloaded = kept["index"] if "disk" in places.values() else None
        dispatch_model(model, places, main_device="cpu", offload_dir=str(directory), offload_index=offloaded)
        self.placed = {device: list(places.values()).count(device) for device in sorted(set(places.values()))}
        self.experts = str(config._experts_implementation)
        self._model = model.eval()
        self._cache = DynamicCache(config=config)
        self._torch = torch

    def feed(self, tokens: list[int]) -> int:
        with self._torch.inference_mode():
            ids = self._torch.tensor([tokens])
            logits = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())


def _index(directory: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((directory / INDEX).read_bytes()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: nothing offloaded here ({error})") from error


def _load_resident(model: Any, places: Mapping[str, Any], index: Mapping[str, Any]) -> None:
    """Copy the parameters of every part that stays in memory; a clone, not a mapping of the file."""
    from accelerate.utils import OffloadedWeightsLoader, set_module_tensor_to_device

    stored = OffloadedWeightsLoader(index=index)
    for name, _ in list(model.named_parameters()):
        if places[_owner(name, places)] == "cpu":
            set_module_tensor_to_device(model, name, "cpu", value=stored[name].clone())


def _owner(name: str, places: Mapping[str, Any]) -> str:
    """The part in ``places`` to which parameter ``name`` belongs; "" stands for the whole model."""
    while name and name not in places:
        name = name.rpartition(".")[0]
    return name


def main() -> int:
    options = _options()
    tokens = read_tokens(options.tokens)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import accelerate
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    limit = memory_limit()
    settings: dict[str, Any] = {"threads": options.threads, "limit_bytes": limit}

    def ready() -> Feed:
        model = Offloaded(options.offloaded, limit)
        settings.update(placed=model.placed, experts=model.experts)
        return model.feed

    said = f"accelerate {accelerate.__version__}, transformers {transformers.__version__}, torch {version('torch')}"
    print(measure(tokens, ready, rival="accelerate", version=said, settings=settings).line())
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("offloaded", type=Path, help="what disk_offload_prepare wrote")
    parser.add_argument("tokens", type=Path, help='{"prompt": [ids], "stream": [ids]}')
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ForegateError as error:
        sys.exit(f"error: {error}")
