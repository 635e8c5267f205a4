"""Draws a loss curve (``FILE.curve.jsonl``)."""

from __future__ import annotations

import json
from pathlib import Path

from foregate.errors import ConfigError


def draw(curve: Path, out: Path, title: str) -> bool:
    """Loss by step, of training and validation, as SVG. False where nothing was logged (methods that only count). What
    a second training of the same file logged has another loss: it is left out."""
    records = [json.loads(line) for line in curve.read_text().splitlines()] if curve.exists() else []
    records = [record for record in records if "stage" not in record]
    if not records:
        return False
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--figure needs matplotlib: pip install 'foregate[analysis]'") from None
    trained = [(record["step"], record["loss"]) for record in records if "loss" in record]
    judged = [(record["step"], record["validation"]["loss"]) for record in records if "validation" in record]
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*trained, strict=True), label="training", linewidth=1)
        axes.plot(*zip(*judged, strict=True), label="validation prompts", marker="o")
        axes.set(title=title, xlabel="step", ylabel="loss")
        axes.legend(frameon=False)
        figure.savefig(out, metadata={"Date": None})
    return True
