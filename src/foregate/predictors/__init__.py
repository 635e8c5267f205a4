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
        "history-transformer": "foregate.predictors.history:HistoryTransformer",
        "history-mlp": "foregate.predictors.history:HistoryMlp",
        "history-lstm": "foregate.predictors.history:HistoryLstm",
        "ids-mlp": "foregate.predictors.ids_mlp:IdsMlp",
        "stale-gate": "foregate.predictors.gate:StaleGate",
        "next-gate": "foregate.predictors.gate:NextGate",
        "quasi-hidden": "foregate.predictors.quasi_hidden:QuasiHidden",
        "estimator": "foregate.predictors.estimator:Estimator",
        "hybrid": "foregate.predictors.estimator:Hybrid",
        "pre-attention": "foregate.predictors.pre_attention:PreAttention",
        "pre-attention-gate": "foregate.predictors.gate:PreAttentionGate",
        "sequence": "foregate.predictors.sequence:Sequence",
        "fusion": "foregate.predictors.fusion:Fusion",
        "fresh-gate": "foregate.predictors.gate:FreshGate",
        "oracle": "foregate.predictors.oracle:Oracle",
        "shuffled": "foregate.predictors.shuffled:Shuffled",
        "random": "foregate.predictors.random:RandomExperts",
    },
    group="foregate.predictors",
)
