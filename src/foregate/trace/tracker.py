"""RouterTracker: records what every router of a live transformers model chooses, with hooks alone.

Shapes: B sequences, L MoE layers, k chosen, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foregate.errors import ConfigError, TraceError
from foregate.trace import format as fmt
from foregate.trace.capture import PassCapture, Wanted, to_record
from foregate.trace.header import FeatureInfo, Header, ModelInfo, RunInfo, ScoreInfo
from foregate.trace.hooks import PassRecorder
from foregate.trace.identity import directory_fingerprint, live_fingerprint
from foregate.trace.record import PromptRecord
from foregate.trace.routing import moe_layers

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class RouterTracker:
    """Context manager around forward passes of ``model``: a transformers model, or an ``Engine``.

    Inside it every pass is recorded; ``take`` gives what was recorded since the last ``take`` or ``clear``. The model's
    results do not change by a bit, and leaving removes every hook. Not thread-safe; one forward pass at a time.
    """

    def __init__(
        self,
        model: Any,
        *,
        features: Sequence[str] = (),
        scores: bool = False,
        timings: bool = False,
        feature_dtype: str = "auto",
    ) -> None:
        """``features`` out of pre_attention, residual, router_input, as float16, bfloat16, or auto: the model's own
        type if it is one of them, else float16. Raises ConfigError, and TraceError for a model without routing.
        """
        check_features(features, feature_dtype)
        spec = getattr(model, "spec", None)
        self._engine = model if spec is not None else None
        self.model: nn.Module = model.model if spec is not None else model
        paths, counts = (spec.module_paths, spec.experts_per_layer) if spec is not None else ((), ())
        self._layers = moe_layers(self.model, paths, counts)
        self._dtype = HALF[_own_dtype(self.model) if feature_dtype == "auto" else feature_dtype]
        self._wanted = Wanted(
            family=str(getattr(getattr(self.model, "config", None), "model_type", type(self.model).__name__)),
            experts=[layer.experts for layer in self._layers],
            scores=scores,
            features=tuple(dict.fromkeys(features)),
            timings=(fmt.TIMINGS if spec is not None else fmt.TIMINGS[:-1]) if timings else (),
        )
        self._recorder: PassRecorder | None = None
        self._passes: list[PassCapture] = []
        self._top_k: tuple[int, ...] = ()
        self._scores: ScoreInfo | None = None
        self._features: dict[str, FeatureInfo] = {}

    def __enter__(self) -> RouterTracker:
        if self._recorder is not None:
            raise TraceError("this tracker is attached already")
        self._recorder = PassRecorder(self.model, self._layers, self._wanted, self._dtype, self._stall())
        self._passes = self._recorder.passes
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook; the model is as it was. What was recorded can still be taken."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def clear(self) -> None:
        """Forget what was recorded: the next pass begins a prompt."""
        self._passes.clear()

    def take(self, prompt: str, domain: str = "", *, prompt_tokens: int | None = None) -> PromptRecord:
        """What was recorded since the last ``take``, as one prompt; passes must have had one sequence each.

        With ``prompt_tokens``, positions from there on count as decode; else passes of one token, but for the first.
        Raises TraceError where nothing was recorded, or a signal that was asked for is nowhere in this model.
        """
        return self.take_batch([prompt], domain, prompt_tokens=prompt_tokens)[0]

    def take_batch(
        self, prompts: Sequence[str], domain: str = "", *, prompt_tokens: int | None = None
    ) -> list[PromptRecord]:
        """The same for passes of B sequences: one record each. Padding (attention mask 0) is left out."""
        passes = list(self._passes)
        self.clear()
        if {one.shape[0] for one in passes} != {len(prompts)}:
            found = f"{len(passes)} forward passes of {sorted({one.shape[0] for one in passes})} sequences"
            raise TraceError(f"prompt {prompts[0]!r} and {len(prompts) - 1} more: recorded were {found}")
        self._learn(passes[0])
        records = [to_record(passes, number, name, domain, self._wanted) for number, name in enumerate(prompts)]
        if prompt_tokens is not None:
            for record in records:
                np.greater_equal(record.positions, prompt_tokens, out=record.decode)
        return records

    def header(self, run: RunInfo, *, name: str = "", fingerprint: str = "", tokenizer: str = "") -> Header:
        """What a trace of this model is; known after the first ``take``. ``name`` is what the user calls the model.

        Without ``fingerprint``, it is that of the checkpoint that the model came from.
        """
        if not self._top_k:
            raise TraceError("nothing has been recorded yet, so the shape of the trace is not known")
        config = getattr(self.model, "config", None)
        model = ModelInfo(
            name=name or str(getattr(config, "_name_or_path", "")) or type(self.model).__name__,
            fingerprint=fingerprint or self._fingerprint(),
            model_type=self._wanted.family,
            dtype=str(next(self.model.parameters()).dtype)[6:],
            hidden_size=_hidden_size(config),
            moe_layers=tuple(layer.decoder_layer for layer in self._layers),
            experts_per_layer=tuple(self._wanted.experts),
            top_k=self._top_k,
            tokenizer=tokenizer,
        )
        return Header(model, (run,), self._scores, self._wanted.timings, self._features)

    def _stall(self) -> Callable[[], float] | None:
        engine = self._engine
        return None if engine is None else lambda: float(engine.pipeline.stats.stall_s)

    def _learn(self, first: PassCapture) -> None:
        """From the first pass: numbers chosen, kind of scores, shapes of features. Raises TraceError for none."""
        if self._top_k:
            return
        if self._wanted.scores:
            self._scores = _score_info([layer.scores for layer in first.layers], self._wanted.family)
        for name in self._wanted.features:
            found = {
                number: layer.features[name] for number, layer in enumerate(first.layers) if name in layer.features
            }
            if not found:
                raise TraceError(f"{self._wanted.family}: no MoE layer of this model has a signal {name!r}")
            shape = tuple(next(iter(found.values())).shape[1:])
            self._features[name] = FeatureInfo(str(self._dtype)[6:], shape, tuple(found))
        self._top_k = tuple(layer.index.shape[1] for layer in first.layers if layer.index is not None)

    def _fingerprint(self) -> str:
        if self._engine is not None:
            return str(self._engine.checkpoint.fingerprint)
        origin = Path(str(getattr(getattr(self.model, "config", None), "_name_or_path", "")))
        return directory_fingerprint(origin) if (origin / "config.json").is_file() else live_fingerprint(self.model)


def check_features(features: Sequence[str], dtype: str) -> None:
    """Raises ConfigError for a feature or a type of features that does not exist."""
    for name in features:
        if name not in fmt.FEATURE_NAMES:
            raise ConfigError(f"unknown feature {name!r}; choose from: {', '.join(fmt.FEATURE_NAMES)}")
    if dtype not in ("auto", *HALF):
        raise ConfigError(f"feature type {dtype!r} is not auto, {' or '.join(HALF)}")


def _score_info(layers: Sequence[Tensor | None], family: str) -> ScoreInfo:
    present = [scores.float() for scores in layers if scores is not None]
    if not present:
        raise TraceError(f"{family}: no router of this model gives scores")
    shares = [bool((scores >= 0).all()) and bool(((scores.sum(-1) - 1).abs() < 0.02).all()) for scores in present]
    return ScoreInfo(max(scores.shape[-1] for scores in present), "probabilities" if all(shares) else "logits")


def _own_dtype(model: nn.Module) -> str:
    own = str(next(model.parameters()).dtype)[6:]
    return own if own in HALF else "float16"


def _hidden_size(config: Any) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "hidden_size", 0))
