"""Decides what is worth reading ahead, from what reading ahead has earned so far. No torch, no I/O.

Two questions. *Is this read worth it?* An expert that is predicted for layer l at distance d and rank r is used with
probability p (measured by layer, and by distance and rank). If it is, it saves the stall of one miss, as far as the
window of l, waits left out, has room behind what is queued already. If not, it costs the CPU time of its bytes, what
readers have of it in their hands when the window ends, which a demand read waits for, and of the rest of its time the
share by which it delays other reads.
*Does speculation pay at all?* Steps without it (the first two, and two in 64) show how long the model waits then for
each expert that it needs, steps with it how long they wait: as steps need now, the difference is what it saves; waste,
queues and a link that never rests are in that. It must be more than the predictor's time, the CPU time of what was
read for nothing, and the hits that the slots set aside would have been (counted: misses of experts that were evicted
last). On a slow link, which needs many layers' time for an expert, little can be saved and much be
lost: there it is off at first, must have paid in the steps that probe, and by more than chance. On a fast one doubt is
in its favour. A link that the first steps need most of the time is tried with few reads, and judged sooner.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from foregate.prefetch.average import Average
from foregate.prefetch.ledger import Ledger
from foregate.prefetch.odds import Costs, Odds
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
"""Reads of a probe, or of one of the first steps, up to which a layer's best guess is tried whatever it seems worth:
nothing else would show that predictions have become better. A slow link is probed with no more."""
_WARM_UP = 8
"""Speculative reads judged before the first decision; twice as many steps are enough, too."""
_PATIENCE = 8
"""Steps with speculation before the first decision on a fast link: the first reads, of a precision not known yet, are
in vain more often, and little is lost by them."""
_LINK_BOUND, _WAITED, _ENOUGH_EXPERTS = 0.95, 0.25, 16
"""Shares of a prompt's time with reads running (1.0 under a throttle, 0.73 to 0.98 without) and of waiting for them,
from which on the link was its bound: where computing is, reads run all the time as well, and slowly. And experts that
it must have read: fewer say little about the long run."""
_PROBES = 4
"""Steps with speculation that a slow link is to be judged by at least, before probes become rare."""
_SLOW = 2.5
"""A link that needs so many layers' time for an expert is slow: 1.0 to 1.2 without a throttle here, 2.9 to 3.4 at 700
MB/s."""
_BUSY = 0.86
"""Share of a step without speculation for which the link is needed, from which on little can be saved: 0.5 to 0.83
without a throttle here, 0.87 to 1 at 1200 MB/s but where three of four experts are resident."""
_IMPOSSIBLE = 1.25
"""The same, beyond which the link is faster than the prompt has said: that also waited for something else, as for the
memory of a new pool (1.3 to 1.5 then; 1.15 where a throttle saves up what is not read)."""
_FAVOUR, _ERRORS = 1, 2
"""Standard errors that speculation is given on a link that brings an expert in a layer's time, where a wrong read costs
little and the first two steps without it say little; and by which it must have paid on a slow one. Between, by line."""
_DOUBT = 0.25
"""Reads by which more or less than before must fit into the windows for slots to be given back or taken: each of those
that are taken costs a resident."""
_PRIOR = 4.0
"""Reads that the precision of all counts for, where a layer, or a distance and rank, has few of its own."""
_EXPECTED = 0.7
"""Precision before any read was judged, worth ``_PRIOR`` reads; trained predictors have 0.65 to 0.9 on the absent."""
_BEST, _FALL, _BEYOND = 0.95, 0.45, 0.25
"""The same by rank: of the first of k, how much less of the k-th, nearly, and of those beyond. Of ``fusion`` and
``next-gate`` 0.96, 0.87, 0.77, 0.54 were measured for four, and 0.2 to 0.1 beyond."""
_CROWDING = 0.2
"""Share of its time by which a read in vain delays others, on a link that brings an expert in a layer's time; all of it
on a slow one, which never rests."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the controller decided for a step, and why. Seconds are estimates for one token."""

    enabled: bool
    reason: str
    precision: float = 1.0
    gain_s: float = 0.0
    loss_s: float = 0.0


class Guess(NamedTuple):
    """Why a read was issued: for ``layer``, from ``distance`` layers before, ``rank``-th of the predicted (from 0)."""

    layer: int
    distance: int
    rank: int


class _Share:
    """How often something was so, with a prior that fades as cases come in."""

    def __init__(self) -> None:
        self.recent = Average(0.03)
        self.cases = 0

    def add(self, so: bool) -> None:
        self.cases += 1
        self.recent.add(1.0 if so else 0.0)

    def blended(self, prior: float) -> float:
        """The recent share, drawn towards ``prior`` while there are few cases."""
        return ((self.recent.value or 0.0) * self.cases + prior * _PRIOR) / (self.cases + _PRIOR)


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
        self._expert_bytes = expert_bytes
        self._in_hand = min(1.0, max(1, readers) * chunk_bytes / expert_bytes)
        """Share of an expert that all readers together are reading."""
        self._top_k = top_k
        self._all = _Share()
        self._by_guess: dict[tuple[int, int], _Share] = {}
        self._by_layer = [_Share() for _ in range(layers)]
        self._windows: list[dict[int, Average]] = [{} for _ in range(layers)]
        """Of each layer, by distance."""
        self._any_window: dict[int, Average] = {}
        self._read_s = Average()
        self._miss_s = Average()
        self._ask_s = Average()
        self._used = Average()
        self._unused = Average()
        self._ahead_bytes = Average()
        self._ghosts = Average()
        self._with, self._alone, self._needed = Waits(0.05), Waits(0.1), Average()
        """Of steps with speculation and without, and what any step needs."""
        self._layer_s = Average()
        self._busy = Average(0.1)
        """Of steps without speculation, the share for which the link was needed."""
        self._link_s: float | None = None
        """For one expert, where a prompt was read as fast as the link gave it."""
        self._now = _Counts()
        self._step = 0
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
            if not self._slow or self._with.steps >= _PROBES:
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
        expert_s, layer_s = self._expert_s, self._layer_s.value
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
        read_s = self._expert_s
        cpu_s = self._expert_bytes * CPU_SECONDS_PER_BYTE
        crowding = _CROWDING + (1 - _CROWDING) * self._slowness
        return Costs(read_s, self._miss_s.get(read_s), cpu_s, self._in_hand * read_s, crowding)

    def odds(self, guesses: Iterable[Guess]) -> list[Odds]:
        """Of each of ``guesses``. What is explored counts as sure."""
        overall = self._precision
        exploring = _EXPLORED - self._issued if self._all.cases < _WARM_UP or self._probing else 0
        found = []
        for guess in guesses:
            explored = guess.rank == 0 and exploring > 0
            exploring -= explored
            found.append(Odds(1.0 if explored else self._likely(guess, overall), self._window(guess)))
        return found

    @property
    def sated(self) -> bool:
        """Whether this step probes a slow link, or is one of the first on a busy one, and has read enough for that:
        what nobody uses, somebody waits for."""
        if self._issued < _EXPLORED:
            return False
        return (self._probing and self._slow) or (self._busy.get() >= _BUSY and self._warming_up)

    def _shape(self, rank: int) -> float:
        """How much likelier than all reads one of ``rank`` is, before any was judged."""
        if self._top_k is None:
            return 1.0
        return (_BEST - _FALL * rank / self._top_k if rank < self._top_k else _BEYOND) / _EXPECTED

    @property
    def trusting(self) -> bool:
        """Whether every read is taken as worth it: a fixed limit, or nobody has read anything yet."""
        return self.fixed is not None or not self._expert_s

    def _likely(self, guess: Guess, overall: float) -> float:
        """Probability that what ``guess`` reads is used, where ``overall`` of all reads are."""
        shared, expected = self._by_guess.get((guess.distance, guess.rank)), min(1.0, overall * self._shape(guess.rank))
        general = shared.blended(expected) if shared else expected
        layer = self._by_layer[guess.layer].blended(overall)
        return min(1.0, general * layer / overall)

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
        self._all.add(used)
        self._by_guess.setdefault((guess.distance, guess.rank), _Share()).add(used)
        self._by_layer[guess.layer].add(used)
        account = self.ledger.accounts[guess.layer]
        account.used += used
        account.unused += not used
        account.late += late
        account.precision = self._by_layer[guess.layer].recent.value
        self._now.used += used
        self._now.unused += not used

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
        if io_s >= _LINK_BOUND * seconds and stall_s >= _WAITED * seconds:
            self._link_s = expert_s
        elif self._link_s is not None and expert_s < self._link_s:
            self._link_s = None

    def saw_layer(self, seconds: float) -> None:
        """``seconds`` passed from one routing to the next, waits left out."""
        if seconds > 0:
            self._layer_s.add(seconds)

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

    def saw_ghost(self) -> None:
        """A miss would have been a hit, had its slot not been set aside for speculation."""
        self._now.ghosts += 1

    # Deciding

    @property
    def _controlling(self) -> bool:
        return 1 <= self._step % CONTROL_EVERY <= CONTROL_STEPS

    @property
    def _layers(self) -> float:
        """How many layers' time an expert takes on the link."""
        return self._expert_s / self._layer_s.get(self._expert_s) if self._expert_s else 1.0

    @property
    def _slow(self) -> bool:
        return self._layers > _SLOW

    @property
    def _slowness(self) -> float:
        """0 on a link that brings an expert in a layer's time, 1 on a slow one."""
        return min(1.0, max(0.0, (self._layers - 1) / (_SLOW - 1)))

    @property
    def _warming_up(self) -> bool:
        """Whether it is too early for a decision."""
        if self.fixed is not None:
            return False
        if not self._with.steps or not self._alone.steps:
            return True
        patience = _PATIENCE * (1 - self._slowness) if self._busy.get() < _BUSY else 0
        return self._with.steps < patience or (self._all.cases < _WARM_UP and self._step <= 2 * _WARM_UP)

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
            self._look_at_link(now)
            return
        self._with.add(now.needed, now.stall_s)
        self._ask_s.add(now.ask_s)
        self._used.add(now.used)
        self._unused.add(now.unused)
        self._ahead_bytes.add(now.ahead_bytes)
        self._ghosts.add(now.ghosts)

    def _look_at_link(self, alone: _Counts) -> None:
        if self._layer_s.value is None:
            return
        step_s = alone.stall_s + len(self._by_layer) * self._layer_s.value
        self._busy.add(alone.needed * self._expert_s / step_s)
        if self._busy.get() > _IMPOSSIBLE and self._link_s is not None:
            self._link_s, self._busy = None, Average(0.1)

    @property
    def _precision(self) -> float:
        return self._all.blended(_EXPECTED)

    @property
    def _expert_s(self) -> float:
        """Seconds of the link for one expert."""
        return self._read_s.get() if self._link_s is None else self._link_s

    def _window(self, guess: Guess) -> float | None:
        """Seconds that pass until the routing of the layer; where it has not been seen yet, of others."""
        window = self._windows[guess.layer].get(guess.distance) or self._any_window.get(guess.distance)
        return self._layer_s.value if window is None else window.value

    def _saved(self) -> float:
        """Seconds that a step of the usual need waits less with speculation than without, and what doubt adds."""
        slowness, needed = self._slowness, self._needed.get()
        miss_s = self._miss_s.get(self._expert_s)
        alone, ahead = (waits.each(miss_s, self._expert_s, slowness) for waits in (self._alone, self._with))
        error = math.hypot(self._alone.error(alone), self._with.error(ahead))
        favour = _FAVOUR - slowness * (_FAVOUR + _ERRORS)
        return self._alone.wait(needed, alone) - self._with.wait(needed, ahead) + favour * error

    def _decide(self) -> Decision:
        precision = self._precision
        if self._warming_up:
            return Decision(not self._slow, "slow link: tried now and then" if self._slow else "warming up", precision)
        expert_s, used = self._expert_s, self._used.get()
        gain = max(0.0, min(self._saved(), used * max(expert_s, self._miss_s.get())))
        in_vain = max(0.0, self._ahead_bytes.get() - used * self._expert_bytes)  # of what is cancelled little was read
        cpu_s = in_vain * CPU_SECONDS_PER_BYTE
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
