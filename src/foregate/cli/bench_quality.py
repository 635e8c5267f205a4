"""``foregate bench --quality``: its texts and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from foregate.cli.trace_setup import find_prompts
from foregate.errors import ConfigError

QUALITY_TOKENS = 500
"""Tokens judged in each domain and mode, if not told."""


def quality_texts(
    wanted: bool,
    low_precision_pack: str | None,
    quality_tokens: int | None,
    datasets: list[str],
    data_dir: Path | None,
    domains: list[str],
) -> list[Any]:
    """(domain, text) of every data set. Raises ConfigError where there is none, or nobody wants it."""
    if not wanted:
        for name, given in (("low-precision pack", low_precision_pack), ("quality tokens", quality_tokens)):
            if given is not None:
                raise ConfigError(f"{name} {given} is for --quality: give that too")
        return []
    if not datasets:
        raise ConfigError("--quality needs texts: give --dataset")
    found = (find_prompts(name, None if Path(name).is_file() else data_dir, None, None, 0) for name in datasets)
    texts = [(prompt.domain, prompt.text + prompt.reference) for each in found for prompt in each.prompts]
    return [text for text in texts if not domains or text[0] in domains]


def quality_table(judged: list[dict[str, Any]]) -> Table:
    """A mode with its predictor and budget a row."""
    shown = Table(title="lossy modes: loss against speed, no memory limit", title_justify="left")
    for name in ("mode", "predictor", "budget", "loss, nats", "same choice", "TPOT ms", "exact TPOT ms", "speed-up"):
        shown.add_column(name, justify="left" if name in ("mode", "predictor") else "right")
    for facts in judged:
        shown.add_row(
            facts["mode"],
            Path(facts["predictor"]).stem,
            facts["memory_budget"],
            f"{facts['delta']:+.4f}",
            f"{facts['agreement']:.1%}",
            f"{facts['tpot_s'] * 1e3:.1f}",
            f"{facts['exact_tpot_s'] * 1e3:.1f}",
            f"{facts['speedup']:.2f}x",
        )
    return shown
