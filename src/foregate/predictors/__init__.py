"""One file a method. A predictor ranks experts of later layers; whether anything is read is not its business."""

from __future__ import annotations

from foregate.registry import Registry

PREDICTORS = Registry(
    "predictor",
    {
        "none": "foregate.predictors.none:NonePredictor",
        "popularity": "foregate.predictors.popularity:Popularity",
        "previous-token": "foregate.predictors.previous:PreviousToken",
        "markov": "foregate.predictors.markov:Markov",
        "eam": "foregate.predictors.eam:ExpertActivation",
        "expert-map": "foregate.predictors.expert_map:ExpertMap",
        "stale-gate": "foregate.predictors.gate:StaleGate",
        "next-gate": "foregate.predictors.gate:NextGate",
        "quasi-hidden": "foregate.predictors.quasi_hidden:QuasiHidden",
        "pre-attention-gate": "foregate.predictors.gate:PreAttentionGate",
        "fresh-gate": "foregate.predictors.gate:FreshGate",
        "oracle": "foregate.predictors.oracle:Oracle",
        "shuffled": "foregate.predictors.shuffled:Shuffled",
        "random": "foregate.predictors.random:RandomExperts",
    },
    group="foregate.predictors",
)
