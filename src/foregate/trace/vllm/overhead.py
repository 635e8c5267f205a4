"""What recording costs vLLM: the same requests with and without the recorder, in turns, in one process.

``python -m foregate.trace.vllm.overhead MODEL`` prints a JSON line; run it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from statistics import median
from time import thread_time
from typing import Any

from foregate.checkpoint.locate import locate
from foregate.config import SamplingConfig
from foregate.trace.vllm.engine import VllmEngine

PROMPTS = [[5 + n, 90, 17, 33, 101, 64, 200, 8] for n in range(4)]
TOKENS = 48
ROUNDS = 7
ARMS: dict[str, Mapping[str, bool] | None] = {
    "none": None,
    "routing": {"scores": False, "timings": False},
    "none again": None,
    "scores": {"scores": True, "timings": False},
    "scores, timings": {"scores": True, "timings": True},
}
"""One run of each a round; the one that is there twice shows what differs by chance."""


def measure(engine: VllmEngine, rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """For every arm, median milliseconds of CPU time of this thread, and the median ratio to ``none`` of its round."""
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for number in range(rounds + 1):
        for name, wanted in ARMS.items():
            seconds = _timed(engine, wanted)
            if number:  # the first round warms up
                times[name].append(seconds)
    ratios = {name: [a / b for a, b in zip(found, times["none"], strict=True)] for name, found in times.items()}
    return {name: {"ms": median(found) * 1e3, "ratio": median(ratios[name])} for name, found in times.items()}


def _timed(engine: VllmEngine, wanted: Mapping[str, bool] | None) -> float:
    sampling = [SamplingConfig(max_new_tokens=TOKENS)] * len(PROMPTS)
    if wanted is not None:
        engine.attach(**wanted)
    began = thread_time()
    engine.run(PROMPTS, sampling)
    if wanted is not None:
        engine.take()
    seconds = thread_time() - began
    engine.detach()
    return seconds


def main(name: str) -> None:
    """Measure with four requests at a time, in the checkpoint's own type."""
    options: dict[str, Any] = {"scores": False, "timings": False, "more": {}}
    engine = VllmEngine(locate(name), dtype="auto", seed=0, batch=len(PROMPTS), kv_cache_bytes=128 << 20, **options)
    engine.detach()
    print(json.dumps({"requests": len(PROMPTS), "tokens": TOKENS, "rounds": ROUNDS, "arms": measure(engine)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
