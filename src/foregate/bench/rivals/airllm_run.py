"""The program that runs airllm: ``… PREPARED --tokens TOKENS.json``; once before, ``… PREPARED --split``."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from foregate.bench.rivals.airllm_layers import SPLIT
from foregate.bench.rivals.outcome import Feed, measure, read_tokens
from foregate.errors import ForegateError


def load(prepared: Path) -> Any:
    """The model, split into layers under ``prepared`` unless that is done. What airllm prints goes to stderr."""
    from airllm import AutoModel

    return AutoModel.from_pretrained(
        str(prepared / "model"), layer_shards_saving_path=str(prepared / SPLIT), device="cpu"
    )


def feeder(model: Any) -> Feed:
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()

    def feed(tokens: list[int]) -> int:
        with torch.inference_mode():
            logits = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits
        return int(logits[0, -1].argmax())

    return feed


def main() -> int:
    options = _options()
    # airllm prints to stdout, whose last line is ours
    out, sys.stdout = sys.stdout, sys.stderr
    if options.split:
        load(options.prepared)
        return 0
    tokens = read_tokens(options.tokens)
    import torch

    torch.set_num_threads(options.threads)
    said = ", ".join(f"{name} {version(name)}" for name in ("airllm", "transformers", "torch"))
    settings = {"threads": options.threads}
    done = measure(tokens, lambda: feeder(load(options.prepared)), rival="airllm", version=said, settings=settings)
    print(done.line(), file=out)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prepared", type=Path, help="what airllm_layers.prepare made")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--tokens", type=Path, help='{"prompt": [ids], "stream": [ids]}')
    mode.add_argument("--split", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ForegateError as error:
        sys.exit(f"error: {error}")
