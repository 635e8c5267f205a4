"""One file a method. A predictor ranks experts of later layers; whether anything is read is not its business."""

from __future__ import annotations

from foregate.registry import Registry

PREDICTORS = Registry(
    "predictor",
    {
        "none": "foregate.predictors.none:NonePredictor",
        "stale-gate": "foregate.predictors.gate:StaleGate",
        "next-gate": "foregate.predictors.gate:NextGate",
        "oracle": "foregate.predictors.oracle:Oracle",
        "random": "foregate.predictors.random:RandomExperts",
    },
)
