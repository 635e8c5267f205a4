"""One file a method. A predictor ranks experts of later layers; whether anything is read is not its business."""

from __future__ import annotations

from foregate.registry import Registry

PREDICTORS = Registry(
    "predictor",
    {
        "none": "foregate.predictors.none:NonePredictor",
        "stale-gate": "foregate.predictors.gate:StaleGate",
        "next-gate": "foregate.predictors.gate:NextGate",
        "pre-attention-gate": "foregate.predictors.gate:PreAttentionGate",
        "fresh-gate": "foregate.predictors.gate:FreshGate",
        "oracle": "foregate.predictors.oracle:Oracle",
        "shuffled": "foregate.predictors.shuffled:Shuffled",
        "random": "foregate.predictors.random:RandomExperts",
    },
    group="foregate.predictors",
)
