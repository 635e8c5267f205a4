"""Decides what is worth reading ahead, from what reading ahead has earned so far. No torch, no I/O.

Two questions. *Is this read worth it?* An expert that is predicted for layer l at distance d and rank r is used with
probability p (measured by layer, and by distance and rank). If it is, it saves the stall of one miss, as far as the
window of l, waits left out, has room behind what is queued already. It costs the CPU time of its bytes, of which
computation has less then, where a model that waits would have lost nothing. If it is in vain, also what readers have of
it in their hands when the window ends, which a demand read waits for, and of the rest of its time the share by which it
delays other reads.
*Does speculation pay at all?* Steps without it (the first two, and two in 64) show how long the model waits then for
each expert that it needs, steps with it how long they wait: as steps need now, the difference is what it saves; waste,
queues and a link that never rests are in that. It must be more than the predictor's time, the CPU time of what was
read ahead, and the hits that the slots set aside would have been (counted: misses of experts that were evicted last).
On a slow link, which needs many layers' time for an expert, a read in vain costs much, and on a busy one, which steps
need most of the time, little can be saved: there it is off at first, must have paid in the steps that probe, and by
more than chance: two standard errors. On a tight one that is neither it starts, but must have paid by one. Else it is
given one, and so the benefit of the doubt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from foregate.prefetch.average import Average
from foregate.prefetch.ledger import Ledger
from foregate.prefetch.link import Link
from foregate.prefetch.odds import Costs, Odds
from foregate.prefetch.precision import Guess, Precision
from foregate.prefetch.waits import Waits

CPU_SECONDS_PER_BYTE = 60e-12
"""60 ms per GB: what O_DIRECT reads cost in CPU time on a virtual disk (25 to 90 measured, checksums included)."""

PROBE_EVERY = 16
"""Switched off, one step in this many still speculates, so that a change of workload is noticed. Doubled, up to
``PROBE_MOST``, each time that the probe finds nothing: a probe costs evictions."""
PROBE_MOST = 128

CONTROL_EVERY = 64
CONTROL_STEPS = 2
"""Switched on, so many steps in so many, the first of them, do without, to see what waiting costs then."""

_EXPLORED = 4
"""Reads of a probe, or of one of the first steps, up to which a layer's best guess is tried as if it were sure: nothing
else would show that predictions have become better. A slow or busy link is tried with no more."""
_WARM_UP = 8
"""Speculative reads judged before the first decision; twice as many steps are enough, too."""
_PATIENCE = 8
"""Steps with speculation before the first decision, but on a slow or busy link: the first reads, of a precision not
known yet, are in vain more often than later ones."""
_PROBES = 4
"""Steps with speculation that a slow or busy link is to be judged by before probes become rare."""
_DUE, _DUE_TIGHT, _DUE_STRAINED = -1, 1, 2
"""Standard errors by which speculation must have paid, on a tight link, where computation often loses what waits gain,
and on a slow or busy one. Elsewhere it is given one, as the first two steps without it say little."""
_DOUBT = 0.25
"""Reads by which more or less than before must fit into the windows for slots to be given back or taken: each of those
that are taken costs a resident."""
_CROWDING = 0.2
"""Share of its time by which a read in vain delays others; all of it on a slow or busy link."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the controller decided for a step, and why. Seconds are estimates for one token."""

    enabled: bool
    reason: str
    precision: float = 1.0
    gain_s: float = 0.0
    loss_s: float = 0.0


class Controller:
    """``limit`` None decides by the cost model; a number is taken as it is (0: never). ``readers`` read chunks at once.
    ``top_k``: experts that a router chooses; without it, all ranks are expected to be alike.

    ``off_reason`` switches speculation off for good, for a reason known beforehand (no staging room, all fits).
    """

    def __init__(
        self,
        limit: int | None,
        *,
        expert_bytes: int,
        chunk_bytes: int,
        readers: int = 1,
        layers: int = 1,
        top_k: int | None = None,
        off_reason: str = "",
    ) -> None:
        self.fixed = limit
        self.off_reason = off_reason
        self.switches = 0
        self.ledger = Ledger(layers)
        started = "start" if limit is None else f"{limit} a layer, as asked"
        self.decision = Decision(not off_reason and limit != 0, off_reason or started)
        self.ledger.decided(0, self.decision.enabled, self.decision.reason)
        self.link = Link(expert_bytes, layers)
        self._expert_bytes = expert_bytes
        self._in_hand = min(1.0, max(1, readers) * chunk_bytes / expert_bytes)
        """Share of an expert that all readers together are reading."""
        self.precision = Precision(layers, top_k)
        self._windows: list[dict[int, Average]] = [{} for _ in range(layers)]
        """Of each layer, by distance."""
        self._any_window: dict[int, Average] = {}
        self._miss_s = Average()
        self._ask_s = Average()
        self._used = Average()
        self._unused = Average()
        self._ahead_bytes = Average()
        self._ghosts = Average()
        self._with, self._alone, self._needed = Waits(0.05), Waits(0.1), Average()
        """Of steps with speculation and without, and what any step needs."""
        self._now = _Counts()
        self._step = 0
        self._judged = False
        """Whether there has been any decision."""
        self._issued = 0
        """Reads of this step."""
        self._set_aside = 0
        """Slots, for speculation."""
        self._probe_at = PROBE_EVERY
        self._probe_every = PROBE_EVERY

    def switch_off(self, reason: str) -> None:
        """No speculation from now on."""
        self.off_reason = reason
        self.decision = Decision(False, reason)
        self.ledger.decided(self._step, False, reason)

    def begin_step(self) -> None:
        """A decode step starts: decide for all of it."""
        self._close_step()
        probed = self._probing
        self._step += 1
        self._issued = 0
        if self.off_reason or self.fixed is not None:
            return
        decided = self._decide()
        if decided.enabled != self.decision.enabled:
            self.switches += 1
            self.ledger.decided(self._step, decided.enabled, decided.reason)
            self._probe_every = PROBE_EVERY
            self._probe_at = self._step + self._probe_every
        elif probed:
            if not self.link.strain or self._with.steps >= _PROBES:
                self._probe_every = min(2 * self._probe_every, PROBE_MOST)
            self._probe_at = self._step + self._probe_every
        self.decision = decided

    @property
    def speculating(self) -> bool:
        """Whether this step may read ahead: switched on, or one of the probes while switched off."""
        if self.off_reason:
            return False
        if self.fixed is not None:
            return self.fixed > 0
        return (self.decision.enabled and not self._controlling) or self._probing

    @property
    def rehearsing(self) -> bool:
        """Whether the predictor is to be asked, and not believed: the next step speculates, and some look one back."""
        if self.off_reason or self.fixed is not None or self.speculating:
            return False
        return (
            self._step % CONTROL_EVERY == CONTROL_STEPS if self.decision.enabled else self._step + 1 == self._probe_at
        )

    def allowance(self, width: int) -> int:
        """Speculative reads that one layer may issue now: at most ``width``, or the fixed limit."""
        if not self.speculating or self.sated:
            return 0
        return width if self.fixed is None else self.fixed

    def staging(self, reach: int, most: int) -> int:
        """Slots of ``most`` to set aside for reading ``reach`` layers ahead: what the link can bring in their time, and
        what it is bringing. More would wait for nothing, where residents would have been hits."""
        expert_s, layer_s = self.link.expert_s, self.link.layer_s.value
        if self.fixed is not None or not expert_s or layer_s is None:
            return most
        reads = reach * layer_s / expert_s
        least, largest = (math.ceil(max(0.0, reads + by)) + 1 for by in (-_DOUBT, _DOUBT))
        if not least <= self._set_aside <= largest:
            self._set_aside = math.ceil(reads) + 1
        return min(most, self._set_aside)

    def value(self, guess: Guess, queued: int) -> float:
        """Seconds that a read for ``guess``, behind ``queued`` reads in flight, saves more than it costs. Expected."""
        return 0.0 if self.sated else self.costs().worth(self.odds((guess,))[0], queued)

    def costs(self) -> Costs:
        """What any read costs and saves now."""
        read_s = self.link.expert_s
        cpu_s = self._expert_bytes * CPU_SECONDS_PER_BYTE
        crowding = 1.0 if self.link.strain else _CROWDING
        return Costs(read_s, self._miss_s.get(read_s), cpu_s, self._in_hand * read_s, crowding)

    def odds(self, guesses: Iterable[Guess]) -> list[Odds]:
        """Of each of ``guesses``. What is explored counts as sure."""
        overall = self.precision.overall
        exploring = _EXPLORED - self._issued if self.precision.cases < _WARM_UP or self._probing else 0
        found = []
        for guess in guesses:
            explored = guess.rank == 0 and exploring > 0
            exploring -= explored
            found.append(Odds(1.0 if explored else self.precision.of(guess, overall), self._window(guess)))
        return found

    @property
    def sated(self) -> bool:
        """Whether this step probes a slow or busy link, and has read enough for that."""
        return self._issued >= _EXPLORED and self._probing and bool(self.link.strain)

    @property
    def trusting(self) -> bool:
        """Whether every read is taken as worth it: a fixed limit, or nobody has read anything yet."""
        return self.fixed is not None or not self.link.expert_s

    # Being told

    def issued(self, guess: Guess) -> None:
        """A read for ``guess`` was submitted."""
        self._issued += 1
        self.ledger.accounts[guess.layer].issued += 1

    def declined(self, guess: Guess) -> None:
        """A read for ``guess`` was not worth it."""
        self.ledger.accounts[guess.layer].declined += 1

    def judge(self, guess: Guess, *, used: bool, late: bool = False) -> None:
        """The read for ``guess`` turned out to be used or not; ``late``: it was still under way when needed."""
        self.precision.add(guess, used)
        account = self.ledger.accounts[guess.layer]
        account.used += used
        account.unused += not used
        account.late += late
        account.precision = self.precision.recent(guess.layer)
        self._now.used += used
        self._now.unused += not used

    def saw_window(self, layer: int, distance: int, seconds: float) -> None:
        """``seconds``, waits for reads left out, passed between the prediction of ``layer``, ``distance`` layers before
        it, and its routing."""
        for kept in (self._windows[layer], self._any_window):
            window = kept.get(distance)
            if window is None:
                window = kept[distance] = Average()
            window.add(seconds)

    def account(self) -> Ledger:
        """The ledger, with the windows as they are now."""
        for account, windows in zip(self.ledger.accounts, self._windows, strict=True):
            account.window_s = max([window.get() for window in windows.values()], default=0.0)
        return self.ledger

    def saw_prediction(self, seconds: float) -> None:
        """Asking the predictor took ``seconds``."""
        self._now.ask_s += seconds

    def saw_misses(self, misses: int, stall_s: float) -> None:
        """In this step the model waited ``stall_s`` for ``misses`` experts that nobody had read ahead."""
        if misses > 0:
            self._miss_s.add(stall_s / misses)

    def saw_step(self, needed: int, stall_s: float, ahead_bytes: int) -> None:
        """In this step ``needed`` experts had to be read, ahead or not; the model waited ``stall_s`` for them, and
        ``ahead_bytes`` came by speculation."""
        self._now.needed, self._now.stall_s, self._now.ahead_bytes = needed, stall_s, ahead_bytes
        self._now.over = True

    def saw_ghost(self) -> None:
        """A miss would have been a hit, had its slot not been set aside for speculation. A prompt's is no step's."""
        self._now.ghosts += not self._now.over

    # Deciding

    @property
    def _controlling(self) -> bool:
        return 1 <= self._step % CONTROL_EVERY <= CONTROL_STEPS

    @property
    def _warming_up(self) -> bool:
        """Whether it is too early for a decision."""
        if self.fixed is not None:
            return False
        if not self._with.steps or not self._alone.steps:
            return True
        if not self._judged and not self.link.strain and self._with.steps < _PATIENCE:
            return True
        return self.precision.cases < _WARM_UP and self._step <= 2 * _WARM_UP

    @property
    def _probing(self) -> bool:
        return not self.decision.enabled and self._step >= self._probe_at

    def _close_step(self) -> None:
        now, self._now = self._now, _Counts()
        if not self._step:
            return
        self._needed.add(now.needed)
        if not self.speculating:
            self._alone.add(now.needed, now.stall_s)
            self.link.saw_step(now.needed, now.stall_s)
            return
        self._with.add(now.needed, now.stall_s)
        self._ask_s.add(now.ask_s)
        self._used.add(now.used)
        self._unused.add(now.unused)
        self._ahead_bytes.add(now.ahead_bytes)
        self._ghosts.add(now.ghosts)

    def _window(self, guess: Guess) -> float | None:
        """Seconds that pass until the routing of the layer; where it has not been seen yet, of others."""
        window = self._windows[guess.layer].get(guess.distance) or self._any_window.get(guess.distance)
        return self.link.layer_s.value if window is None else window.value

    def _saved(self) -> float:
        """Seconds that a step of the usual need surely waits less with speculation than without; what is sure enough
        depends on the link."""
        needed, expert_s, strained = self._needed.get(), self.link.expert_s, bool(self.link.strain)
        if strained:
            alone = ahead = expert_s
        else:
            alone, ahead = (waits.each(self._miss_s.get(expert_s)) for waits in (self._alone, self._with))
        error = math.hypot(self._alone.error(alone), self._with.error(ahead))
        due = _DUE_STRAINED if strained else _DUE_TIGHT if self.link.tight else _DUE
        return self._alone.wait(needed, alone) - self._with.wait(needed, ahead) - due * error

    def _decide(self) -> Decision:
        precision, strain = self.precision.overall, self.link.strain
        if self._warming_up:
            return Decision(not strain, f"{strain} link: tried now and then" if strain else "warming up", precision)
        self._judged = True
        expert_s, used = self.link.expert_s, self._used.get()
        gain = max(0.0, min(self._saved(), used * max(expert_s, self._miss_s.get())))
        cpu_s = self._ahead_bytes.get() * CPU_SECONDS_PER_BYTE
        loss = cpu_s + self._ask_s.get() + self._ghosts.get() * expert_s
        enabled = gain > loss
        verdict = "pays" if enabled else "does not pay"
        reason = (
            f"{verdict}: saves {gain * 1e3:.2f} ms, costs {loss * 1e3:.2f} ms a token "
            f"({used:.1f} used, {self._unused.get():.1f} unused reads, {self._ghosts.get():.1f} hits lost)"
        )
        return Decision(enabled, reason, precision, gain, loss)


@dataclass(slots=True)
class _Counts:
    """Of the step that runs."""

    used: int = 0
    unused: int = 0
    ghosts: int = 0
    needed: int = 0
    stall_s: float = 0.0
    ahead_bytes: int = 0
    ask_s: float = 0.0
    over: bool = False
