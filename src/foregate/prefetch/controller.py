"""Decides how many experts a layer may read ahead, from what reading ahead has earned so far. No torch, no I/O.

Value of one speculative read: with probability p it saves ``min(read, window)`` seconds of stall; otherwise it costs
the CPU time of its bytes and half a chunk's time on a busy disk (demand overtakes at the next chunk).
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
    """What the controller decided for a step, and why. Seconds are estimates per speculative read."""

    enabled: bool
    reason: str
    precision: float
    gain_s: float
    loss_s: float


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
        self.decision = Decision(not off_reason and limit != 0, off_reason or "start", 1.0, 0.0, 0.0)
        self._expert_bytes = expert_bytes
        self._chunk_share = min(1.0, chunk_bytes / expert_bytes)
        self._judged = 0
        self._precision = Average()
        self._read_s = Average()
        self._window_s = Average()
        self._step = 0

    def switch_off(self, reason: str) -> None:
        """No speculation from now on."""
        self.off_reason = reason
        self.decision = Decision(False, reason, self.decision.precision, 0.0, 0.0)

    def begin_step(self) -> None:
        """A decode step starts: decide for all of it."""
        self._step += 1
        if self.off_reason or self.fixed is not None:
            return
        decided = self._decide()
        self.switches += decided.enabled != self.decision.enabled
        self.decision = decided

    def allowance(self, width: int) -> int:
        """Speculative reads that one layer may issue now, at most ``width``."""
        if self.off_reason:
            return 0
        if self.fixed is not None:
            return self.fixed
        if not self.decision.enabled and self._step % PROBE_EVERY:
            return 0
        fits = self._fits()
        return width if fits is None else max(1, min(width, fits))

    def judge(self, *, used: bool) -> None:
        """A speculative read has turned out to be used or not."""
        self._judged += 1
        self._precision.add(1.0 if used else 0.0)

    def saw_read(self, seconds: float) -> None:
        """A demand read took ``seconds`` from submit to arrival."""
        self._read_s.add(seconds)

    def saw_window(self, seconds: float) -> None:
        """``seconds`` passed between the predictions for a layer and its routing."""
        self._window_s.add(seconds)

    def _fits(self) -> int | None:
        """Reads that one window has room for: M = floor(window / read time)."""
        if not self._read_s.value or self._window_s.value is None:
            return None
        return int(self._window_s.value / self._read_s.value)

    def _decide(self) -> Decision:
        precision = 1.0 if self._precision.value is None else self._precision.value
        if self._judged < _WARM_UP or self._read_s.value is None or self._window_s.value is None:
            return Decision(True, "warming up", precision, 0.0, 0.0)
        gain = precision * min(self._read_s.value, self._window_s.value)
        wasted = self._expert_bytes * CPU_SECONDS_PER_BYTE + 0.5 * self._chunk_share * self._read_s.value
        loss = (1.0 - precision) * wasted
        enabled = gain > loss
        reason = f"{'pays' if enabled else 'does not pay'}: gains {gain * 1e6:.0f} µs, loses {loss * 1e6:.0f} µs a read"
        return Decision(enabled, reason, precision, gain, loss)
