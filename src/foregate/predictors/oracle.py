"""Control: perfect knowledge, from a recording of the same run. The upper bound that others are judged by."""

from __future__ import annotations

from collections.abc import Sequence

from foregate.errors import ConfigError
from foregate.interfaces import Signals
from foregate.predictors.base import BasePredictor
from foregate.types import Phase, Prediction, RoutingStep


class RouteRecorder:
    """A routing observer that keeps what every layer chose in every decode step, in order."""

    def __init__(self) -> None:
        self.steps: list[dict[int, tuple[int, ...]]] = []

    def on_route(self, step: RoutingStep) -> None:
        if step.phase is Phase.PREFILL:
            return
        if not self.steps or step.layer in self.steps[-1]:
            self.steps.append({})
        self.steps[-1][step.layer] = tuple(dict.fromkeys(step.experts.ravel().tolist()))


class Oracle(BasePredictor):
    """Replays a recording: predicts exactly what the routers of the next ``lookahead`` layers will choose."""

    name = "oracle"
    signal = "a recording of the same run"
    source = "control: perfect"

    def __init__(self, lookahead: int = 1) -> None:
        super().__init__(lookahead)
        self._steps: list[dict[int, tuple[int, ...]]] = []
        self._of: object = None
        self._at = -1
        self._seen = -1

    def load(self, recorder: RouteRecorder, generation: object) -> None:
        """Take a recording of ``generation`` (anything that names it), which is about to be repeated."""
        self._steps = recorder.steps
        self._of = generation

    def knows(self, generation: object) -> bool:
        """Whether its recording is of ``generation``."""
        return self._of is generation or (self._of is not None and self._of == generation)

    def reset(self) -> None:
        self._at = -1
        self._seen = -1

    def observe(self, step: RoutingStep) -> None:
        if step.phase is Phase.PREFILL:
            return
        if self._at < 0 or step.layer <= self._seen:
            self._at += 1
        self._seen = step.layer

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        if not self._steps:
            raise ConfigError("predictor 'oracle' needs a recording of the same run; it has none")
        ahead = range(signals.layer + 1, signals.layer + self.lookahead + 1)
        known = [(target, self._chosen(target, signals.layers)) for target in ahead]
        return [Prediction(target, experts, (1.0,) * len(experts)) for target, experts in known if experts]

    def _chosen(self, target: int, layers: int) -> tuple[int, ...]:
        """Experts of MoE layer ``target``, of this token or, from ``layers`` on, of the tokens after it."""
        step = self._at + target // layers
        return self._steps[step].get(target % layers, ()) if 0 <= step < len(self._steps) else ()
