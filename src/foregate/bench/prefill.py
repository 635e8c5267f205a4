"""Where the first token's time goes: the disk's busy share and its gaps, waits, expert arithmetic, everything else.

``python -m foregate.bench.prefill PACK``: prompt lengths x budgets, interleaved and cold, one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from itertools import product
from time import process_time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin at a barrier starve the readers

from foregate.bench.prompts import BUILT_IN
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.events import Event, Part, ReadEnded, ReadSpan, TimeSpent, TokenMade


class PrefillWatch:
    """A listener: what happened until the first token."""

    def __init__(self) -> None:
        self.reads: list[ReadSpan] = []
        self.parts: dict[Part, int] = dict.fromkeys(Part, 0)
        self.first: TokenMade | None = None

    def on_event(self, event: Event) -> None:
        if self.first is not None:
            return
        if isinstance(event, ReadEnded):
            self.reads += event.spans
        elif isinstance(event, TimeSpent):
            self.parts[event.part] += event.ended - event.began
        elif isinstance(event, TokenMade):
            self.first = event

    def summary(self) -> dict[str, float]:
        """Seconds and bytes. ``disk_busy_s``: at least one read ran; ``disk_span_s``: first read to last."""
        assert self.first is not None, "no token was made"
        first, last = _ends(self.reads)
        nbytes, busy = sum(span.nbytes for span in self.reads), _covered(self.reads)
        return {
            "ttft_s": (self.first.ended - self.first.began) * 1e-9,
            "read_bytes": nbytes,
            "disk_busy_s": busy * 1e-9,
            "disk_span_s": (last - first) * 1e-9,
            "disk_gb_per_s": nbytes / busy if busy else 0.0,
            **{f"{part.value}_s": spent * 1e-9 for part, spent in self.parts.items()},
        }


def _ends(spans: Sequence[ReadSpan]) -> tuple[int, int]:
    return min((s.began for s in spans), default=0), max((s.ended for s in spans), default=0)


def _covered(spans: Iterable[ReadSpan]) -> int:
    """Nanoseconds in which at least one of ``spans`` ran."""
    covered, until = 0, 0
    for span in sorted(spans, key=lambda s: s.began):
        covered += max(0, span.ended - max(span.began, until))
        until = max(until, span.ended)
    return covered


def prompt_of(engine: Engine, tokens: int) -> list[int]:
    """Real text of exactly ``tokens`` tokens: the built-in prompts, again and again."""
    ids: list[int] = []
    while len(ids) < tokens:
        for text in BUILT_IN.values():
            ids += engine.encode(text, "off")
    return ids[:tokens]


def measured(engine: Engine, tokens: int, budget: str, decode: int = 8, **settings: Any) -> dict[str, Any]:
    """One cold run with a prompt of ``tokens`` tokens, and how many of the first decoded experts were there."""
    engine.reset(memory_budget=budget, **settings)
    watch = PrefillWatch()
    stop = engine.listen(watch)
    before = process_time()
    cpu = 0.0
    for step in engine.stream(prompt_of(engine, tokens), SamplingConfig(max_new_tokens=1 + decode)):
        cpu = cpu or process_time() - before
        last = step
    stop()
    assert engine.report is not None
    second, rest = engine.report.decode[0].stats, engine.report.as_dict()["decode"]
    return {
        "prompt_tokens": tokens,
        "budget": budget,
        **settings,
        **watch.summary(),
        "cpu_s": cpu,
        "first_decode_hit": second.hits / (second.hits + second.misses),
        "decode_hit": rest["hit_rate"],
        "last_token": last.token_id,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m foregate.bench.prefill", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--budget", nargs="+", default=["50%", "25%"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    with Engine(RunConfig(model=options.model, memory_budget="50%", threads=options.threads)) as engine:
        for _ in range(options.rounds):
            for tokens, budget in product(options.tokens, options.budget):
                print(json.dumps(measured(engine, tokens, budget)), flush=True)


if __name__ == "__main__":
    main()
