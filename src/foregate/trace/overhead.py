"""What tracing costs: decode steps of a plain model with and without the tracker, in turns.

``python -m foregate.trace.overhead MODEL`` prints a JSON line; ``measure`` takes any model and any way to run it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from time import thread_time
from typing import Any

from foregate.trace.format import FEATURE_NAMES
from foregate.trace.tracker import RouterTracker

TOKENS = 16
ROUNDS = 25
ARMS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "routing": {},
    "routing again": {},
    "none again": None,
    "scores": {"scores": True},
    "scores, features": {"scores": True, "features": FEATURE_NAMES},
    "scores, features, timings": {"scores": True, "features": FEATURE_NAMES, "timings": True},
}
"""One run of each a round; the two that are there twice show what differs by chance."""


def measure(tracked: Any, run: Callable[[], None], rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """For every arm, the median milliseconds of ``run`` and the median of the ratios to ``none`` of the same round.

    CPU time of this thread, so that other work on the machine disturbs little: run with OMP_NUM_THREADS=1. Taking the
    record (once a prompt) is part of it; writing it is not.
    """
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for number in range(rounds + 1):
        for name, options in ARMS.items():
            seconds = _timed(tracked, run, options)
            if number:  # the first round warms up
                times[name].append(seconds)
    ratios = {name: [a / b for a, b in zip(found, times["none"], strict=True)] for name, found in times.items()}
    return {name: {"ms": median(found) * 1e3, "ratio": median(ratios[name])} for name, found in times.items()}


def _timed(tracked: Any, run: Callable[[], None], options: dict[str, Any] | None) -> float:
    with nullcontext() if options is None else RouterTracker(tracked, **options) as tracker:
        began = thread_time()
        run()
        if tracker is not None:
            tracker.take("p")
        return thread_time() - began


def main(name: str) -> None:
    """Measure a resident model on a prompt of one token, TOKENS decode steps."""
    import torch
    from transformers import AutoModelForCausalLM

    from foregate.checkpoint.locate import locate

    model = AutoModelForCausalLM.from_pretrained(locate(name), dtype="auto", local_files_only=True).eval()

    @torch.inference_mode()
    def run() -> None:
        past, ids = None, torch.tensor([[5]])
        for _ in range(TOKENS):
            out = model(input_ids=ids, past_key_values=past, use_cache=True)
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)

    print(json.dumps({"model": name, "tokens": TOKENS, "rounds": ROUNDS, "arms": measure(model, run)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
