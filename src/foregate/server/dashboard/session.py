"""One engine, one thread that generates, and the brakes: start, pause, step, stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from foregate.config import SamplingConfig
from foregate.errors import ForegateError
from foregate.server.dashboard.board import Board

if TYPE_CHECKING:
    from foregate.engine.engine import Engine

JOIN_S = 30.0
"""Seconds that ``close`` gives the token in hand."""


class BusyError(ForegateError):
    """The request does not fit what the session does now."""


class Session:
    """Generates on a thread of its own; methods may be called from any. ``running``: a run is going on, or paused.

    Owns neither the engine nor its closing.
    """

    def __init__(self, engine: Engine) -> None:
        self.board = Board(engine.spec.experts_per_layer, _about(engine), tuple(engine.cache.resident))
        self._engine = engine
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.running = False
        self._paused = False
        self._steps = 0
        self._stopping = False
        self._stop_listening: Callable[[], None] = engine.listen(self.board)

    @property
    def report(self) -> dict[str, Any] | None:
        """The last finished run, as ``foregate run --json`` prints it."""
        report = self._engine.report
        return report.as_dict() if report is not None and not self.running else None

    def start(self, prompt: str, sampling: SamplingConfig, *, paused: bool = False) -> None:
        """Begin a run. Raises PromptError; BusyError while one is going on."""
        with self._changed:
            if self.running:
                raise BusyError("a run is going on: stop it first")
            ids = self._engine.encode(prompt)
            self._paused, self._steps, self._stopping, self.running = paused, 0, False, True
            self.board.begin(prompt)
            self.board.say("paused" if paused else "running")
            self._thread = threading.Thread(
                target=self._generate, args=(ids, sampling), name="foregate-generate", daemon=True
            )
            self._thread.start()

    def pause(self) -> None:
        """Stand still after the token in hand."""
        self._brake(paused=True)

    def resume(self) -> None:
        self._brake(paused=False)

    def step(self) -> None:
        """One more token, then stand still."""
        self._brake(paused=True, steps=1)

    def stop(self) -> None:
        """End the run after the token in hand."""
        with self._changed:
            self._check_running()
            self._stopping = True
            self._changed.notify_all()

    def close(self) -> None:
        """Stop generating and listening."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(JOIN_S)
        self._stop_listening()

    def _brake(self, *, paused: bool, steps: int = 0) -> None:
        with self._changed:
            self._check_running()
            self._paused = paused
            self._steps = self._steps + steps if steps else 0
            self.board.say("paused" if paused else "running")
            self._changed.notify_all()

    def _check_running(self) -> None:
        if not self.running:
            raise BusyError("no run is going on")

    def _generate(self, ids: list[int], sampling: SamplingConfig) -> None:
        error = ""
        try:
            if self._may_go_on():
                steps = self._engine.stream(ids, sampling)
                for _ in steps:
                    if not self._may_go_on():
                        steps.close()
        except Exception as failure:  # the outermost handler of this thread: the page shows it
            error = f"{failure}" if isinstance(failure, ForegateError) else f"{type(failure).__name__}: {failure}"
        with self._changed:
            self.running = False
            self.board.say("failed" if error else "idle", error)

    def _may_go_on(self) -> bool:
        """Wait while paused, unless a step was asked for; False when the run is to end."""
        with self._changed:
            while self._paused and not self._steps and not self._stopping:
                self._changed.wait()
            self._steps = max(0, self._steps - 1)
            return not self._stopping


def _about(engine: Engine) -> dict[str, Any]:
    config, plan = engine.config, engine.plan
    return {
        "model": config.model,
        "top_k": engine.spec.top_k,
        "slots": plan.slots,
        "slot_bytes": plan.slot_bytes,
        "budget_bytes": plan.budget_bytes,
        "predictor": config.predictor,
        "prefetch": config.prefetch,
        "lookahead": engine.predictor.lookahead,
        "cache_policy": config.cache_policy,
        "store": "packed" if engine.checkpoint.packed else "direct",
    }
