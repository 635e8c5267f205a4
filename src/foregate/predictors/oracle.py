"""Control: perfect knowledge, from a recording of the same run. The upper bound that others are judged by."""

from __future__ import annotations

from collections.abc import Sequence

from foregate.errors import ConfigError
from foregate.interfaces import Signals
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


class Oracle:
    """Replays a recording: predicts exactly what the routers of the next ``lookahead`` layers will choose."""

    name = "oracle"

    def __init__(self, lookahead: int = 1) -> None:
        self.lookahead = lookahead
        self._steps: list[dict[int, tuple[int, ...]]] = []
        self._at = -1
        self._seen = -1

    def load(self, recorder: RouteRecorder) -> None:
        """Take a recording of the generation that is about to be repeated."""
        self._steps = recorder.steps

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
        if not 0 <= self._at < len(self._steps):
            return ()
        chosen = self._steps[self._at]
        last = min(signals.layer + self.lookahead, signals.layers - 1)
        targets = [target for target in range(signals.layer + 1, last + 1) if target in chosen]
        return [Prediction(t, chosen[t], (1.0,) * len(chosen[t])) for t in targets]
