"""What an evaluation leaves in its directory: result.json, table.md, figures (extra ``foregate[analysis]``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foregate.analysis.chart import Chart, Lines, Series, numbers
from foregate.analysis.figures import check_matplotlib, draw
from foregate.errors import ConfigError
from foregate.evaluation.provenance import training_lines
from foregate.evaluation.table import columns, markdown, ranked, rows

SHOWN = 10
"""Curves of one chart at most: the best, besides the oracle."""


def check_out(out: Path, *, figures: bool) -> None:
    """Raises ConfigError where ``out`` cannot be written to, or matplotlib is missing: before the work, not after."""
    if figures:
        check_matplotlib()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be made ({error.strerror})") from None


def write(result: Mapping[str, Any], out: Path, *, figures: bool) -> list[str]:
    """Write everything; names of the files."""
    (out / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    lines = "".join(f"\n{line}\n" for line in training_lines(result))
    (out / "table.md").write_text(markdown(columns(result), rows(result)) + lines)
    names = ["result.json", "table.md"]
    for chart in charts(result) if figures else ():
        names += draw(chart, out)
    return names


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """Recall by layer and by width; misses covered and gain by budget."""
    shown = [name for name in ranked(result) if name not in ("none", "shuffled", "fresh-gate")][: SHOWN + 1]
    chosen = {name: result["predictors"][name] for name in shown}
    by_layer = [_series(name, one["by_layer"]["recall_at_k"]) for name, one in chosen.items()]
    by_width = [_mapped(name, one["recall_at"]) for name, one in chosen.items()]
    misses = [_mapped(name, one["recall_on_misses"]) for name, one in chosen.items()]
    gains = [_mapped(name, one["oracle_gain"]) for name, one in chosen.items()]
    policy = result["about"]["policy"]
    return [
        Lines("recall_by_layer", "Recall@k by layer, all experts", "MoE layer", "recall@k", by_layer),
        Lines("recall_by_width", "Recall of the k chosen among the first m", "m", "recall", by_width),
        Lines("recall_on_misses", f"Misses covered at equal bytes, {policy}", "residency, %", "recall", misses),
        Lines("oracle_gain", f"Share of the oracle's gain, {policy}, simulated", "residency, %", "share", gains),
    ]


def _series(name: str, values: list[float | None]) -> Series:
    return Series(name, [float(n) for n in range(len(values))], numbers(values), dashed=name == "oracle")


def _mapped(name: str, values: Mapping[str, float | None]) -> Series:
    x = [float(key.rstrip("%")) for key in values]
    return Series(name, x, numbers(values.values()), dashed=name == "oracle")
