"""What was published, to be put beside what is measured here: numbers in %, and what differs in the set-up."""

from __future__ import annotations

HISTORY = {
    "history-mlp": {"top1": 65.0}, "history-lstm": {"top1": 82.0},
    "history-transformer": {"top1": 93.7, "recall_at_k": 78.4, "exact_set": 43.0},
}  # fmt: skip
"""Pipelined inference with a lightweight gating network: MLP and LSTM about, Transformer layer 12, N+2."""

HISTORY_SETUP = (
    "published: Qwen1.5-MoE-A2.7B, one layer of 24, 4 of 60 experts, templated prompts, the layer "
    "after the next; here all "
    "layers of a model of 30 M parameters, 4 of 32 experts, real prompts held out by text, decode tokens only"
)

LOSSES = {
    ("mse", 1): 86.61, ("mse", 2): 86.61, ("weighted-bce", 1): 89.00, ("weighted-bce", 2): 90.19,
    ("focal", 1): 86.40, ("focal", 2): 87.64, ("ranking-bce", 1): 89.19, ("ranking-bce", 2): 89.95,
}  # fmt: skip
"""Pre-attention expert prediction, accuracy after one epoch, by loss and architecture."""

PRE_ATTENTION = {
    "DeepSeek-V2-Lite": (93.03, 98.65, 98.85), "Qwen3-30B-A3B": (94.69, 98.81, 99.55),
    "Phi-mini-MoE": (97.62, 99.05, 98.95),
}  # fmt: skip
"""The same after 30 epochs, layer 1, the hardest: exact (k), over-provisioned (10 for 6, 12 for 8, 3 for 2), top-1."""
PRE_ATTENTION_SETUP = (
    "published: 10 M samples of MMLU, 30 epochs, DeepSeek-V2-Lite (6 of 64); here some ten thousand "
    "tokens, few epochs, "
    "4 of 32 experts; the papers do not say whether accuracy is recall or equality of sets, so both are given"
)
LOSSES_SETUP = (
    "published: one epoch of 10 M samples of MMLU, DeepSeek-V2-Lite (6 of 64); here one epoch of some ten thousand "
    "tokens, 4 of 32 experts, and recall@k, where the papers do not say which accuracy they mean"
)
STALE_GATE = 78.79
"""The cross-layer baseline in the same paper (FATE)."""

EXECUTED = {"quasi-hidden": 78.5, "hybrid": 93.8}
"""Speculating experts, Qwen3-30B: share of the average score of 0.817 that is kept when guesses are computed (0.641;
0.766, the second at second hand)."""
EXECUTED_SETUP = (
    "theirs is the average score of Qwen3-30B (8 of 128 experts) on benchmarks, ours the next tokens of given texts, "
    "in which no wrong token stands in the way of the next, and 4 of 32 experts. Of GPT-OSS a loss of about 2 points "
    "was reported"
)


def compared(ours: float, theirs: float, setup: str) -> str:
    """One sentence on the difference, made from the numbers. ``ours`` from 0 to 1, ``theirs`` in %."""
    gap = 100 * ours - theirs
    if abs(gap) < 1:
        return f"Ours is within a point of the published {theirs:g} % although the set-ups differ ({setup})."
    word = "above" if gap > 0 else "below"
    return f"Ours is {abs(gap):.1f} points {word} the published {theirs:g} %; what differs: {setup}."
