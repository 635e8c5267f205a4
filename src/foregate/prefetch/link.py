"""What the link to the experts gives, against what layers take and steps need. No torch, no I/O."""

from __future__ import annotations

import math

from foregate.prefetch.average import Average

_BOUND, _WAITED, _ENOUGH_EXPERTS = 0.95, 0.25, 16
"""Shares of a prompt's time with reads running (1.0 under a throttle, 0.73 to 0.98 without) and of waiting for them,
from which on the link was its bound: where computing is, reads run all the time as well, and slowly. And experts that
it must have read: fewer say little about the long run."""
_SLOW, _SLOW_NO_MORE = 3.5, 3.0
"""A link that needs this many layers' time for an expert is slow: each read in vain costs so much that trying alone is
dear. 4.3 to 5.3 at 700 MB/s here."""
_BUSY, _RESTS = 0.86, 0.82
"""Share of a step without speculation for which the link is needed, from which on little can be saved, and below which
that is over: 0.35 to 0.86 in the first two steps without a throttle here."""
_TIGHT, _TIGHT_NO_MORE = 2.0, 1.8
"""A link that needs this many layers' time for an expert is tight: 0.8 to 2.0 without a throttle here; at 1200 MB/s 1.5
to 2.4 in a text's first steps, 1.8 to 3.3 in later ones."""
_TIGHT_BUSY, _TIGHT_RESTS = 0.8, 0.74
"""A tight link is busy from here on and rests below that, as trying costs more: at 1200 MB/s 0.5 to 0.86 where three of
four experts are resident, 0.81 to 1.1 where two are. They overlap."""
_IMPOSSIBLE = 1.25
"""Share of the time that steps without speculation took, beyond which the link is faster than the prompt has said: that
also waited for something else, as for the memory of a new pool (1.3 to 1.5 then; 1.15 where a throttle saves up what is
not read)."""


class Link:
    """Of experts of ``expert_bytes``, in a model of ``layers``."""

    def __init__(self, expert_bytes: int, layers: int) -> None:
        self._expert_bytes = expert_bytes
        self._layers = layers
        self.layer_s = Average()
        """From one routing to the next, waits left out."""
        self._read_s = Average()
        self._long_run_s: float | None = None
        """For one expert, where a prompt was read as fast as the link gave it."""
        self._needed, self._stall_s, self._step_s = Average(0.1), Average(0.1), Average(0.1)
        """Of steps without speculation: experts that they need, and seconds that they wait for them and take."""
        self.tight, self.slow, self.busy = False, False, False
        """Whether an expert takes two layers' time, whether many, and whether steps need the link most of the time."""

    def saw_io(self, nbytes: int, seconds: float) -> None:
        """``nbytes`` were read in ``seconds`` in which at least one read was running."""
        if nbytes > 0 and seconds > 0:
            self._read_s.add(seconds * self._expert_bytes / nbytes)

    def saw_prompt(self, nbytes: int, io_s: float, stall_s: float, seconds: float) -> None:
        """A prompt took ``seconds``; in ``io_s`` of them at least one read of its ``nbytes`` was running, and for
        ``stall_s`` the model waited.

        Where that was the bound, it tells what the link gives in the long run: some give more after a rest. Where it
        was not, only that a link said to be slower is faster now.
        """
        if nbytes < _ENOUGH_EXPERTS * self._expert_bytes:
            return
        expert_s = seconds * self._expert_bytes / nbytes
        if io_s >= _BOUND * seconds and stall_s >= _WAITED * seconds:
            self._long_run_s = expert_s
        elif self._long_run_s is not None and expert_s < self._long_run_s:
            self._long_run_s = None
        self._look()

    def saw_layer(self, seconds: float) -> None:
        """``seconds`` passed from one routing to the next, waits left out."""
        if seconds > 0:
            self.layer_s.add(seconds)
            self._look()

    def saw_step(self, needed: int, stall_s: float) -> None:
        """A step without speculation needed ``needed`` experts that were absent, and waited ``stall_s`` for them."""
        if self.layer_s.value is None:
            return
        self._needed.add(needed)
        self._stall_s.add(stall_s)
        self._step_s.add(stall_s + self._layers * self.layer_s.value)
        if self._needed.get() * self.expert_s > _IMPOSSIBLE * self._step_s.get():
            self._long_run_s, self.busy = None, False
        self._look()

    def _look(self) -> None:
        """Whether it is tight, slow or busy, as far as is known."""
        layers = self.expert_s / self.layer_s.get(math.inf)
        self.tight = layers >= (_TIGHT_NO_MORE if self.tight else _TIGHT)
        busy, rests = (_TIGHT_BUSY, _TIGHT_RESTS) if self.tight else (_BUSY, _RESTS)
        self.busy = self.need >= (rests if self.busy else busy)
        self.slow = layers > (_SLOW_NO_MORE if self.slow else _SLOW)

    @property
    def expert_s(self) -> float:
        """Seconds for one expert; 0 before the first read."""
        return self._read_s.get() if self._long_run_s is None else self._long_run_s

    @property
    def need(self) -> float:
        """Share of steps without speculation for which it is needed; 0 before the first. Above 1 where it gave more
        than it does in the long run.

        Of a tight link at what layers take now: the first ones of a text take twice as long, and its steps would pass
        for steps that need it little. Where trying is cheap that only wavers.
        """
        if self._stall_s.value is None:
            return 0.0
        now_s = self._stall_s.value + self._layers * self.layer_s.get()
        return self._needed.get() * self.expert_s / (now_s if self.tight else self._step_s.get())

    @property
    def strain(self) -> str:
        """ "slow" or "busy", or empty: either way what is read in vain is what something else waits for."""
        return "slow" if self.slow else "busy" if self.busy else ""
