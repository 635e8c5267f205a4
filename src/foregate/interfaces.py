"""The seams, on one page. Each has a real implementation and at least one more (synchronous, faulty, simulated)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from foregate.events import ReadSpan
from foregate.types import ExpertKey, ExpertLayout, Moment, Prediction, PredictorCost, RoutingStep


class Shift(Protocol):
    """What is added to a hidden state, where the kernels find it."""

    def place(self, layer: int) -> int:
        """Address of that of ``layer``, as long as this lives."""
        ...


class ExpertRead(Protocol):
    """The reading of one expert into one slot, in ``chunks`` independent parts; ``read`` may run on any thread."""

    chunks: int
    disk_bytes: int

    def read(self, index: int) -> None:
        """Read chunk ``index``. Blocking. Raises OSError (the transfer retries) or ForegateError (it does not)."""
        ...

    def finish(self) -> None:
        """Bring the bytes into slot layout and verify them, after every chunk. Raises ExpertReadError."""
        ...

    def where(self, index: int) -> str:
        """File, offset and expert of chunk ``index``, for error messages."""
        ...


class ExpertStore(Protocol):
    """Where experts lie when they are not in a slot."""

    slot_bytes: int

    @property
    def direct_io(self) -> bool:
        """False once the file system has refused O_DIRECT."""
        ...

    def layout(self, layer: int) -> ExpertLayout:
        """Layout of every expert of MoE layer ``layer``, but for those that a pack keeps finer than the others."""
        ...

    def begin(self, key: ExpertKey, into: memoryview) -> ExpertRead:
        """Plan a read of ``key`` into ``into`` (page-aligned, ``slot_bytes`` long). Reads nothing yet."""
        ...

    def close(self) -> None: ...


class Ticket(Protocol):
    """One submitted transfer, from submit to its end."""

    key: ExpertKey
    slot: int
    speculative: bool

    @property
    def spans(self) -> Sequence[ReadSpan]:
        """What has been read for it so far, by whom and when; complete once ``done``."""
        ...

    @property
    def done(self) -> bool:
        """True once nothing will write to the slot any more: complete, failed, or cancelled."""
        ...

    @property
    def ok(self) -> bool:
        """True once the expert is in its slot, verified."""
        ...


class Transfer(Protocol):
    """Moves experts into slots in the background. Demand overtakes speculation; nothing is read twice."""

    def submit(self, key: ExpertKey, slot: int, *, speculative: bool) -> Ticket: ...

    def promote(self, ticket: Ticket) -> None:
        """A speculative transfer that is needed now: continue it at demand priority."""
        ...

    def wait(self, ticket: Ticket) -> None:
        """Block until the bytes are there. Raises TransferError with file, offset and expert, or on time-out."""
        ...

    def wait_any(self, tickets: Sequence[Ticket]) -> Ticket:
        """Block until one of ``tickets`` (not empty) has ended, and return it; ``wait`` tells how it ended."""
        ...

    def cancel(self, ticket: Ticket) -> bool:
        """Read no further chunk. True when the slot is free now; False while a chunk is still being read."""
        ...

    def close(self) -> None: ...


class EvictionPolicy(Protocol):
    """Chooses which resident expert to forget. Knows keys, not slots or bytes."""

    def touch(self, key: ExpertKey) -> None:
        """``key`` was used (or has just become resident)."""
        ...

    def victim(self, candidates: Collection[ExpertKey]) -> ExpertKey:
        """The candidate to evict; ``candidates`` is never empty and keeps cache order."""
        ...

    def forget(self, key: ExpertKey) -> None:
        """``key`` left the cache."""
        ...


@runtime_checkable
class RoutingAware(Protocol):
    """A policy that is told more than accesses. Without these calls it must do with ``touch``."""

    def observe(self, layer: int, experts: NDArray[np.int64], scores: NDArray[np.float32] | None = None) -> None:
        """The router of MoE layer ``layer`` chose ``experts`` [T, k] (-1: none), before any of them is touched.

        ``scores`` [T, E] of all its experts: logits, or what is never negative and larger for likelier experts; None
        where the family's router gives none. Both may be overwritten after the call, and are not to be changed: copy
        what is kept.
        """
        ...


@runtime_checkable
class Advised(RoutingAware, Protocol):
    """A policy that takes advice from a predictor, as ``echo`` does: see ``Adviser``."""

    def advise(self, layer: int, advice: NDArray[np.float32], weights: NDArray[np.float32]) -> None:
        """In what ``observe`` has just made known of ``layer``, log-odds of being needed soon: ``weights`` [5] of the
        policy's own five features, and ``advice`` [E] in place of its bias. Until ``observe`` is called again. Raises
        ConfigError for another shape or values that are not finite."""
        ...

    def wants_advice(self, layer: int) -> bool:
        """Whether advice on ``layer``, of which ``observe`` has just told, would be used, if only to judge it."""
        ...

    def takes_advice(self) -> bool:
        """Whether some was used, and it is not worse than what the policy knows by itself."""
        ...


class RoutingObserver(Protocol):
    """Told of every routing decision, in execution order."""

    def on_route(self, step: RoutingStep) -> None: ...


class Signals(Protocol):
    """What a decode step has made known at ``moment`` of MoE layer ``layer``, of its last token. Tensors stay outside.

    The engine implements it over a live model, evaluation over a recorded trace: a predictor cannot tell them apart.
    """

    layer: int
    moment: Moment
    layers: int
    top_k: int
    position: int
    """Position in the sequence of the token that is being computed, and ``token_id``, its id."""
    token_id: int

    @property
    def experts(self) -> Sequence[int]:
        """E of every MoE layer."""
        ...

    def hidden(self, name: str) -> NDArray[np.float32]:
        """[D]: ``"pre_attention"``, ``"residual"`` (after attention) or ``"router_input"`` of this layer.

        Raises ConfigError where the model has no such signal, or it is not known at this moment.
        """
        ...

    def addresses(self, *names: str, numbers: int) -> tuple[tuple[int, ...], int] | None:
        """Where ``hidden`` of each name lies in memory until this layer ends, at least ``numbers`` of it, and in which
        format of ``native.matrix``; None where only ``hidden`` tells. For compiled predictors: copies take long.
        """
        ...

    def normed(self, target: int, residual: NDArray[np.float32]) -> NDArray[np.float32]:
        """Norm_target(``residual``), [D]: what the router of MoE layer ``target`` would be fed."""
        ...

    def scores(self, target: int, router_input: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores [E] that the router of MoE layer ``target`` gives for ``router_input`` [D]. Order is what counts."""
        ...

    def rank(self, target: int, source: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Experts of MoE layer ``target`` by its own router, best first, with scores, both [E].

        ``source`` is what the router is fed: ``"router_input"`` or ``"pre_attention"`` (of this layer, as they are) or
        ``"residual"`` (the residual stream after attention, through the norm of ``target``). Raises ConfigError where
        the model has no such signal.
        """
        ...

    def best(self, target: int, source: str, most: int | None) -> Prediction:
        """The first ``most`` (1 or more; None: all) of ``rank`` as a prediction, which takes a third of the time."""
        ...

    def begin_best(self, target: int, source: str, most: int | None) -> Callable[[], Prediction]:
        """``best`` for a ``Beginner``: what is returned tells, and another thread may compute meanwhile."""
        ...

    def begin_shifted(self, target: int, shift: Shift, most: int) -> Callable[[], Prediction | None] | None:
        """``begin_best`` on ``"residual"`` and what a compiled predictor adds to it (``native.shift.Shift``). None, or
        None from what this returns: only ``normed`` and ``scores`` tell. What is returned keeps ``shift``, which must
        not keep that.
        """
        ...

    def choice_of(self, step: RoutingStep) -> tuple[int, int] | None:
        """Where experts [k] (int64) and weights [k] (float32) of ``step`` lie in memory until this layer ends; None
        where only the step tells, or it is not the one that was told last. For compiled predictors, as above.
        """
        ...


class Predictor(Protocol):
    """Scores experts of later layers. Asked once per MoE layer of every decode step, at its ``moment``.

    Registered in ``predictors.PREDICTORS`` as ``module:Class`` (or through the entry point group
    ``foregate.predictors``) and made as ``Class(lookahead=N)``, or, where it must be fitted first (``needs_file``), as
    ``Class.from_file(artifact, lookahead)``; ``predictors.base.BasePredictor`` has the defaults.
    Whatever it says or raises changes no token: experts that do not exist are dropped, and an exception switches
    speculation off.
    """

    name: str
    signal: str
    """What it looks at, for tables: ``"router_input"``, ``"routing history"``, …"""
    moment: Moment
    lookahead: int
    """Layers between the layer at which it is asked and the farthest that it predicts; 0 is the same layer."""
    asks_routers: bool
    """Whether it is worthless where the model's routers cannot be asked ahead."""

    def cost(self) -> PredictorCost:
        """Of one ``predict``."""
        ...

    def reset(self) -> None:
        """Forget the sequence (a new prompt begins)."""
        ...

    def observe(self, step: RoutingStep) -> None:
        """The router of one layer has chosen, in prefill (all tokens) or decode. The arrays of ``step`` are not written
        to afterwards, and not to be changed."""
        ...

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        """Predictions for this layer (if not routed yet), later layers or the next token; empty where it knows none."""
        ...


class Beginner(Predictor, Protocol):
    """A predictor that can compute while the engine goes on. Asked after routing, it may be told so: first ``begin``,
    once it has observed the choice, then what that returned, in place of ``predict``."""

    def begin(self, signals: Signals) -> Callable[[], Sequence[Prediction]]:
        """Start, and return what waits for the end and tells what ``predict`` would. It is called before anything that
        ``signals`` show changes, and before the next ``observe``, ``reset`` or ``begin``; its answer may be dropped."""
        ...


class Adviser(Predictor, Protocol):
    """A predictor that also tells the eviction policy which experts of the layer at hand will be needed again soon."""

    def advise(self, signals: Signals) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """``Advised.advise``'s ``advice`` and ``weights``; None: nothing for this layer. Asked in decode steps once the
        layer is routed, before ``observe``; whether or not speculation is on, for it reads nothing. The attribute may
        be None: then it has no advice."""
        ...
