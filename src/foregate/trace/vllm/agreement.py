"""How far a trace agrees with transformers, which routes the same tokens again, given and in one pass a prompt.

``python -m foregate.trace.vllm.agreement TRACE MODEL`` prints it; it needs transformers, not vLLM.
Shapes: T tokens, L MoE layers, k chosen, E experts; D = T x L decisions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foregate.checkpoint.locate import locate
from foregate.errors import ForegateError, TraceError
from foregate.trace.identity import directory_fingerprint
from foregate.trace.part import Part
from foregate.trace.reader import TraceReader
from foregate.trace.record import Array, PromptRecord
from foregate.trace.tracker import RouterTracker

Floats = NDArray[np.float64]


@dataclass(slots=True)
class Agreement:
    """Decisions of both sides, one array entry a decision.

    ``equal``: whether the sets of experts are the same. ``layer``: MoE layer. ``first``: no decision of an earlier
    layer of the same prompt differs, so that the difference arose here. ``weights``: largest difference of the router
    weights, NaN where the sets differ. ``margin``: log-probability of the last expert chosen over the first that was
    not, by transformers. ``shift``: largest difference of log-probabilities between both sides. The last two are NaN
    without router scores in the trace.
    """

    equal: NDArray[np.bool_]
    layer: NDArray[np.int64]
    first: NDArray[np.bool_]
    weights: Floats
    margin: Floats
    shift: Floats
    tokens: int = 0
    prompts: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of decisions with the same set of experts."""
        return float(self.equal.mean())

    def summary(self) -> dict[str, Any]:
        """Everything in numbers, as JSON takes it."""
        return {
            **self.settings,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "decisions": len(self.equal),
            "different": int((~self.equal).sum()),
            "share_equal": self.share,
            "tokens_equal_in_all_layers": _tokens_equal(self),
            "largest_weight_difference": _largest(self.weights),
            **_ties(self),
        }


def compare(trace: Path | str, model: str, *, dtype: str = "", stepwise: bool = False) -> Agreement:
    """Route the tokens of ``trace`` through ``model`` in transformers, in the trace's dtype or ``dtype``.

    With ``stepwise``, one token a pass instead of all at once: what transformers is then compared with in the trace has
    other shapes of matrices, so this shows what rounding alone does. Raises TraceError for a trace of another model.
    """
    reader = TraceReader(trace)
    directory = locate(model)
    if directory_fingerprint(directory) != reader.header.model.fingerprint:
        raise TraceError(f"{trace} is a trace of {reader.header.model.name}, not of {model}")
    dtype = dtype or reader.header.model.dtype
    live = _load(directory, dtype)
    records = _records(reader, live, stepwise=stepwise)
    found = _join([_compare(part, record, scores=reader.header.scores is not None) for part, record in records])
    found.settings = {"model": model, "trace_dtype": reader.header.model.dtype, "dtype": dtype, "stepwise": stepwise}
    return found


def self_agreement(trace: Path | str, model: str, *, dtype: str = "") -> Agreement:
    """The control: transformers token by token against itself in one pass, over the tokens of ``trace``."""
    reader = TraceReader(trace)
    live = _load(locate(model), dtype or reader.header.model.dtype)
    pairs = zip(_records(reader, live, stepwise=True), _records(reader, live, stepwise=False), strict=True)
    found = _join([_compare_records(steps, whole) for (_, steps), (_, whole) in pairs])
    found.settings = {"model": model, "dtype": dtype or reader.header.model.dtype, "control": "transformers, itself"}
    return found


def _load(directory: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), local_files_only=True).eval()


def _records(reader: TraceReader, live: Any, *, stepwise: bool) -> Iterator[tuple[Part, PromptRecord]]:
    """Every prompt of the trace, and what transformers routes for its tokens."""
    with RouterTracker(live, scores=True) as tracker, torch.inference_mode():
        for part in reader.parts():
            ids = part.grid(part.token_id)[:, 0].tolist()
            tracker.clear()
            past = None
            for step in [[token] for token in ids] if stepwise else [ids]:
                past = live(input_ids=torch.tensor([step]), past_key_values=past, use_cache=True).past_key_values
            yield part, tracker.take(part.prompt)


def _compare(part: Part, record: PromptRecord, *, scores: bool) -> Agreement:
    given = part.grid(part.scores) if scores else None
    return _compared(part.grid(part.experts), part.grid(part.weights), given, record)


def _compare_records(one: PromptRecord, other: PromptRecord) -> Agreement:
    return _compared(one.experts, one.weights, one.scores, other)


def _compared(experts: Array, weights: Array, scores: Array | None, record: PromptRecord) -> Agreement:
    """``experts`` and ``weights`` [T, L, k], ``scores`` [T, L, E] against a record of the same tokens."""
    if experts.shape != record.experts.shape:
        raise TraceError(f"transformers routed {record.experts.shape}, the trace has {experts.shape} (T, L, k)")
    mine, theirs = np.argsort(experts, axis=-1), np.argsort(record.experts, axis=-1)
    equal = (_take(experts, mine) == _take(record.experts, theirs)).all(axis=-1)
    apart = np.abs(_take(weights, mine).astype(float) - _take(record.weights, theirs)).max(axis=-1)
    tokens, layers = equal.shape
    clean = np.cumsum((~equal).any(axis=0)) == (~equal).any(axis=0)
    margin, shift = _margins(record, scores)
    return Agreement(
        equal=equal.reshape(-1),
        layer=np.tile(np.arange(layers), tokens),
        first=np.broadcast_to(clean, equal.shape).reshape(-1),
        weights=np.where(equal, apart, np.nan).reshape(-1),
        margin=margin.reshape(-1),
        shift=shift.reshape(-1),
        tokens=tokens,
        prompts=1,
    )


def _margins(record: PromptRecord, scores: Array | None) -> tuple[Floats, Floats]:
    """Margin and shift [T, L] of routers that take the k experts with the largest scores."""
    if scores is None or record.scores is None:
        nothing = np.full(record.experts.shape[:2], np.nan)
        return nothing, nothing
    theirs, mine = _log_probabilities(record.scores), _log_probabilities(scores)
    ranked = -np.sort(-theirs, axis=-1)
    chosen = record.experts.shape[-1]
    return ranked[..., chosen - 1] - ranked[..., chosen], np.abs(mine - theirs).max(axis=-1)


def _log_probabilities(scores: Array) -> Floats:
    """Of logits; probabilities come out as they are, because their logarithms are logits too."""
    values = scores.astype(float)
    if (values >= 0).all() and np.allclose(values.sum(-1), 1, atol=0.02):
        values = np.log(np.maximum(values, 1e-30))
    values = values - values.max(axis=-1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis=-1, keepdims=True)))


def _ties(found: Agreement) -> dict[str, Any]:
    """What the margins of the differences look like beside all margins; nothing without router scores."""
    if np.isnan(found.margin).all():
        return {}
    apart = ~found.equal
    numbers: dict[str, Any] = {
        "median_margin": float(np.median(found.margin)),
        "median_shift": float(np.median(found.shift)),
        "share_of_margins_below_median_shift": float((found.margin <= np.median(found.shift)).mean()),
    }
    if apart.any():
        new = apart & found.first
        numbers |= {
            "median_margin_where_different": float(np.median(found.margin[apart])),
            "largest_margin_where_different": float(found.margin[apart].max()),
            # two scores that move towards each other can bridge twice the shift
            "different_within_twice_the_shift": float((found.margin[apart] <= 2 * found.shift[apart]).mean()),
            "exact_ties_where_different": float((found.margin[apart] == 0).mean()),
            "different_where_they_arose": int(new.sum()),
            "largest_margin_where_they_arose": float(found.margin[new].max()),
        }
    return numbers


def _tokens_equal(found: Agreement) -> float:
    return float(found.equal.reshape(-1, int(found.layer.max()) + 1).all(axis=1).mean())


def _largest(values: Floats) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmax(values))


def _take(values: Array, order: Array) -> Array:
    return np.take_along_axis(values, order, axis=-1)


def _join(parts: Sequence[Agreement]) -> Agreement:
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("equal", "layer", "first", "weights", "margin", "shift")
    }
    return Agreement(**arrays, tokens=sum(part.tokens for part in parts), prompts=len(parts))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the agreement as one JSON object. Exit code 1 and one line for an error of ours."""
    parser = argparse.ArgumentParser(prog="python -m foregate.trace.vllm.agreement", description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="", help="of transformers; that of the trace if not given")
    parser.add_argument("--stepwise", action="store_true", help="transformers routes one token a pass")
    parser.add_argument("--control", action="store_true", help="transformers stepwise against itself in one pass")
    given = parser.parse_args(arguments)
    try:
        if given.control:
            found = self_agreement(given.trace, given.model, dtype=given.dtype)
        else:
            found = compare(given.trace, given.model, dtype=given.dtype, stepwise=given.stepwise)
    except ForegateError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(json.dumps(found.summary(), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
