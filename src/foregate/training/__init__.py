"""From routing traces to predictor files. A trainer is found by the name of the predictor that it trains."""

from __future__ import annotations

from foregate.registry import Registry

TRAINERS = Registry("trainer", {})
"""Name of a predictor → ``module:TRAINER``, a ``training.trainer.Trainer``."""
