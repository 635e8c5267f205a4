"""``interfaces.Signals`` over a recorded trace: its hidden states, the model's own norms and routers.

A predictor cannot tell it from the engine's. Shapes: T decode tokens, L MoE layers, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from foregate.analysis.prompt import Shape
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.engine.signals import FEATURES, ModelSignals, Ranking
from foregate.errors import ConfigError, TraceError
from foregate.evaluation.held_out import HeldPrompt
from foregate.interfaces import Shift
from foregate.types import Moment, Prediction, RoutingStep


def open_routers(model: str, fingerprint: str, token_ids: Sequence[int]) -> ModelSignals:
    """Norms and routers of ``model``, learned as the engine learns them: in one pass over ``token_ids``.

    Raises TraceError where it is not the model that was traced, CheckpointError where it cannot be opened.
    """
    with Engine(RunConfig(model=model, predictor="none")) as engine:
        if engine.checkpoint.fingerprint != fingerprint:
            raise TraceError(
                f"model {model!r} has the fingerprint {engine.checkpoint.fingerprint}, the trace is of {fingerprint}"
            )
        list(engine.stream(list(token_ids), SamplingConfig(max_new_tokens=1)))
        return engine.signals


class TraceSignals:
    """Set ``begin(prompt)``, then ``at(token, layer, moment)`` before every question.

    ``routers`` None: a trace without its model; what needs a router raises ConfigError. ``batched``: ``rank`` asks a
    router once for all tokens of a prompt, which differs from asking token by token in rounding only.
    """

    def __init__(self, shape: Shape, routers: ModelSignals | None, *, batched: bool = True) -> None:
        self.layer = 0
        self.moment = Moment.BEFORE_ATTENTION
        self.layers = shape.layers
        self.top_k = max(shape.top_k)
        self.position = 0
        self.token_id = -1
        self._experts = shape.experts_per_layer
        self._routers = routers
        self._batched = batched
        self._token = 0
        self._prompt: HeldPrompt | None = None
        self._ranked: dict[tuple[int, int, str], Ranking] = {}

    @property
    def experts(self) -> Sequence[int]:
        """E of every MoE layer."""
        return self._experts

    def begin(self, prompt: HeldPrompt) -> None:
        """The prompt that is spoken of from now on."""
        self._prompt = prompt
        self._ranked.clear()

    def at(self, token: int, layer: int, moment: Moment) -> None:
        """Where the pass is: ``moment`` of ``layer`` of decode token ``token``."""
        assert self._prompt is not None
        self._token, self.layer, self.moment = token, layer, moment
        self.position = int(self._prompt.position[token])
        self.token_id = int(self._prompt.token_id[token])

    def hidden(self, name: str) -> NDArray[np.float32]:
        """See ``interfaces.Signals``."""
        if self.moment is Moment.BEFORE_ATTENTION and name != "pre_attention":
            raise ConfigError(f"MoE layer {self.layer} has no {name} {self.moment.value}")
        row: NDArray[np.float32] = self._rows(name)[self._token]
        return row

    def addresses(self, *names: str, numbers: int) -> None:
        """See ``interfaces.Signals``: None, as what was recorded need not outlive the question."""

    def begin_shifted(self, target: int, shift: Shift, most: int) -> None:
        """See ``interfaces.Signals``: None, as a trace has no router that is compiled."""

    def begin_best(self, target: int, source: str, most: int | None) -> Callable[[], Prediction]:
        """See ``interfaces.Signals``."""
        return partial(self.best, target, source, most)

    def choice_of(self, step: RoutingStep) -> None:
        """See ``interfaces.Signals``: None, as above."""

    @torch.inference_mode()
    def normed(self, target: int, residual: NDArray[np.float32]) -> NDArray[np.float32]:
        """See ``interfaces.Signals``."""
        return self._asked().normed(target, residual)

    @torch.inference_mode()
    def scores(self, target: int, router_input: NDArray[np.float32]) -> NDArray[np.float32]:
        """See ``interfaces.Signals``."""
        return self._asked().scores(target, router_input)

    @torch.inference_mode()
    def rank(self, target: int, source: str) -> Ranking:
        """See ``interfaces.Signals``."""
        routers = self._asked()
        fed = routers.fed_with(self.layer, target, source)
        if not self._batched:
            return routers.rank_row(target, fed, self.hidden(fed))
        key = (self.layer, target, fed)
        if key not in self._ranked:
            self.hidden(fed)  # not known yet, or not at all: the same error as for one token
            self._ranked[key] = routers.rank_rows(target, fed, self._rows(fed))
        order, scores = self._ranked[key]
        return order[self._token], scores[self._token]

    def best(self, target: int, source: str, most: int | None) -> Prediction:
        """See ``interfaces.Signals``."""
        experts, scores = self.rank(target, source)
        return Prediction(target, tuple(experts[:most].tolist()), tuple(scores[:most].tolist()))

    def _rows(self, name: str) -> NDArray[np.float32]:
        """Signal ``name`` of this layer, [T, D]."""
        if name not in FEATURES:
            raise ConfigError(f"unknown signal {name!r}; choose from: {', '.join(FEATURES)}")
        assert self._prompt is not None
        if name not in self._prompt.hidden:
            raise ConfigError(f"the trace has no feature {name}: trace with --features {name}")
        rows: NDArray[np.float32] = self._prompt.hidden[name][:, self.layer]
        if np.isnan(rows[0, 0]):
            raise ConfigError(f"MoE layer {self.layer} has no {name}")
        return rows

    def _asked(self) -> ModelSignals:
        if self._routers is None:
            raise ConfigError("the routers of the traced model are not at hand: give --model")
        return self._routers
