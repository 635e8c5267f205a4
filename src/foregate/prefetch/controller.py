"""Decides how many experts a layer may read ahead, from what reading ahead has earned so far. No torch, no I/O.

A speculative read saves ``min(read, window)`` seconds of stall with probability p; otherwise it costs the CPU time of
its bytes and half a chunk's time on a busy disk (demand overtakes at the next chunk). Asking the predictor costs its
own time. Speculation stops where the sum is negative.
"""

from __future__ import annotations

from dataclasses import dataclass

CPU_SECONDS_PER_BYTE = 60e-12
"""60 ms per GB: what O_DIRECT reads cost in CPU time on a virtual disk (50-70 ms measured)."""

PROBE_EVERY = 16
"""Switched off, one step in this many still speculates, so that a change of workload is noticed."""

_WARM_UP = 8
"""Speculative reads judged before the first decision."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the controller decided for a step, and why. Seconds are estimates for one layer."""

    enabled: bool
    reason: str
    precision: float = 1.0
    gain_s: float = 0.0
    loss_s: float = 0.0


class Average:
    """Exponentially weighted mean; None until the first value."""

    def __init__(self, weight: float = 0.05) -> None:
        self.value: float | None = None
        self._weight = weight

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self.value + self._weight * (value - self.value)


class Controller:
    """``limit`` None decides by the cost model; a number is taken as it is (0: never).

    ``off_reason`` switches speculation off for good, for a reason known beforehand (no staging room, all fits).
    """

    def __init__(self, limit: int | None, *, expert_bytes: int, chunk_bytes: int, off_reason: str = "") -> None:
        self.fixed = limit
        self.off_reason = off_reason
        self.switches = 0
        started = "start" if limit is None else f"{limit} a layer, as asked"
        self.decision = Decision(not off_reason and limit != 0, off_reason or started)
        self._expert_bytes = expert_bytes
        self._chunk_share = min(1.0, chunk_bytes / expert_bytes)
        self._judged = 0
        self._precision = Average()
        self._read_s = Average()
        self._window_s = Average()
        self._ask_s = Average()
        self._asked = Average()
        self._step = 0

    def switch_off(self, reason: str) -> None:
        """No speculation from now on."""
        self.off_reason = reason
        self.decision = Decision(False, reason)

    def begin_step(self) -> None:
        """A decode step starts: decide for all of it."""
        self._step += 1
        if self.off_reason or self.fixed is not None:
            return
        decided = self._decide()
        self.switches += decided.enabled != self.decision.enabled
        self.decision = decided

    @property
    def speculating(self) -> bool:
        """Whether this step may read ahead: switched on, or one of the probes while switched off."""
        if self.off_reason:
            return False
        if self.fixed is not None:
            return self.fixed > 0
        return self.decision.enabled or self._step % PROBE_EVERY == 0

    def allowance(self, width: int) -> int:
        """Speculative reads that one layer may issue now: at most ``width``, or the fixed limit."""
        if not self.speculating:
            return 0
        if self.fixed is not None:
            return self.fixed
        fits = self._fits()
        return width if fits is None else max(1, min(width, fits))

    def judge(self, *, used: bool) -> None:
        """A speculative read has turned out to be used or not."""
        self._judged += 1
        self._precision.add(1.0 if used else 0.0)

    def saw_io(self, nbytes: int, seconds: float) -> None:
        """``nbytes`` were read in ``seconds`` in which at least one read was running."""
        if nbytes > 0 and seconds > 0:
            self._read_s.add(seconds * self._expert_bytes / nbytes)

    def saw_window(self, seconds: float) -> None:
        """``seconds`` passed between the predictions for a layer and its routing."""
        self._window_s.add(seconds)

    def saw_prediction(self, seconds: float, issued: int) -> None:
        """Asking the predictor took ``seconds`` and led to ``issued`` reads."""
        self._ask_s.add(seconds)
        self._asked.add(issued)

    def _fits(self) -> int | None:
        """Reads that one window has room for: M = floor(window x bandwidth / expert bytes)."""
        if not self._read_s.value or self._window_s.value is None:
            return None
        return int(self._window_s.value / self._read_s.value)

    def _decide(self) -> Decision:
        precision = 1.0 if self._precision.value is None else self._precision.value
        if self._judged < _WARM_UP or self._read_s.value is None or self._window_s.value is None:
            return Decision(True, "warming up", precision)
        reads = self._asked.value or 0.0
        wasted = self._expert_bytes * CPU_SECONDS_PER_BYTE + 0.5 * self._chunk_share * self._read_s.value
        gain = reads * precision * min(self._read_s.value, self._window_s.value)
        loss = reads * (1.0 - precision) * wasted + (self._ask_s.value or 0.0)
        enabled = gain > loss
        verdict = "pays" if enabled else "does not pay"
        return Decision(
            enabled, f"{verdict}: gains {gain * 1e6:.0f} µs, costs {loss * 1e6:.0f} µs a layer", precision, gain, loss
        )
