"""From routing traces to predictor files. A trainer is found by the name of the predictor that it trains."""

from __future__ import annotations

from foregate.registry import Registry

TRAINERS = Registry(
    "trainer",
    {
        "popularity": "foregate.training.counting:POPULARITY",
        "markov": "foregate.training.counting:MARKOV",
        "eam": "foregate.training.library:EAM",
        "expert-map": "foregate.training.library:EXPERT_MAP",
        "quasi-hidden": "foregate.training.calibration:QUASI_HIDDEN",
        "history-mlp": "foregate.training.history:MLP",
        "history-lstm": "foregate.training.history:LSTM",
        "history-transformer": "foregate.training.history:TRANSFORMER",
        "ids-mlp": "foregate.training.ids_mlp:TRAINER",
        "estimator": "foregate.training.estimator:ESTIMATOR",
        "hybrid": "foregate.training.estimator:HYBRID",
        "pre-attention": "foregate.training.pre_attention:TRAINER",
        "sequence": "foregate.training.sequence:TRAINER",
        "fusion": "foregate.training.fusion:TRAINER",
    },
)
"""Name of a predictor → ``module:TRAINER``, a ``training.trainer.Trainer``."""
