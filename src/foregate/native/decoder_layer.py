"""A decoder layer of one token up to its experts in one compiled call (``native/layer.h``).

Shapes: D hidden, E experts, k chosen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from foregate.native.attention_block import AttentionBlock, HeadNorm
from foregate.native.kernels import (
    DROPPED,
    MOST_EXPERTS,
    NOBODY,
    REFUSED,
    UNDECIDED,
    called,
    check,
    loaded,
    num_threads,
)
from foregate.native.matrix import BF16, Matrix
from foregate.native.residents import Residents
from foregate.native.router import Router

Norm = tuple[Tensor, float]
Turns = tuple[int, int, int]
"""Where cosines and sines of a position lie, and how many there are of each."""


def turned(cos: Tensor, sin: Tensor) -> Turns:
    """For ``DecoderLayer``; both [1, 1, R], as ``AttentionBlock.takes`` them, or of more positions, of which it is the
    first; to be kept by the caller."""
    return cos.data_ptr(), sin.data_ptr(), cos.shape[2]


class _Layer(ctypes.Structure):
    """``decoder_layer`` of layer.h."""

    _fields_ = [
        ("attention", c_void_p),
        ("before", HeadNorm),
        ("after", HeadNorm),
        ("gate", Matrix),
        *((name, c_int32) for name in ("top", "normalised", "dtype")),
        *((name, c_void_p) for name in ("normed", "residual", "routed")),
        *((name, c_void_p) for name in ("logits", "ids", "weights", "scores", "shares", "parts", "there")),
    ]


class Choice:
    """What a router has chosen for one token, in every form that is asked for: ``logits``, ``weights`` and ``index`` as
    ``Router`` gives them; for numpy ``experts`` and ``shares`` [1, k] and the logits as ``scores`` [1, E]. ``parts``
    [k, D] has room for what the experts give. The next token overwrites all of it."""

    def __init__(self, router: Router) -> None:
        rows, k = router.gate.rows, router.top_k
        self.logits = torch.zeros(1, rows, dtype=torch.bfloat16)
        self.weights, self.index = torch.zeros(1, k, dtype=router.dtype), torch.zeros(1, k, dtype=torch.int64)
        self.parts = torch.zeros(k, router.gate.columns, dtype=torch.bfloat16)
        self.experts = self.index.numpy()
        self.scores, self.shares = np.zeros((1, rows), np.float32), np.zeros((1, k), np.float32)
        self.places = self.experts.ctypes.data, self.shares.ctypes.data


def fits(attention: AttentionBlock, before: Norm, after: Norm, router: Router) -> bool:
    """Whether these can be made one ``DecoderLayer``."""
    widths = {attention.inputs, attention.outputs, router.gate.columns, len(before[0]), len(after[0])}
    return widths == {attention.inputs} and attention.inputs % 16 == 0 and router.top_k <= MOST_EXPERTS


class Gone(NamedTuple):
    """What ``end_experts`` and the layer that followed gave; ``mix`` and that layer took so many nanoseconds."""

    computed: int
    mix: int
    layer: int
    routed: bool


class DecoderLayer:
    """``attention`` between two norms (weight [D], epsilon), with a sum around it, and the ``router`` after the second.

    ``normed`` (input of attention), ``residual`` (sum after it) and ``routed`` (input of the router) are [1, D],
    ``choice`` is the router's, and ``hidden`` [1, 1, D] what the layer hands on: the next token overwrites all of them.
    """

    def __init__(self, attention: AttentionBlock, before: Norm, after: Norm, router: Router) -> None:
        self._kept = after, router
        self.attention, self._before, self.width = attention, before, attention.inputs
        hidden = [torch.zeros(1, attention.inputs, dtype=torch.bfloat16) for _ in range(3)]
        self.normed, self.residual, self.routed = hidden
        self.choice = made = Choice(router)
        norms = [HeadNorm(weight.data_ptr(), len(weight), small) for weight, small in (before, after)]
        at = [row.data_ptr() for row in (*hidden, made.logits, made.index, made.weights)]
        at += [made.scores.ctypes.data, made.shares.ctypes.data, made.parts.data_ptr()]
        self._layer = _Layer(attention.at, *norms, router.gate, router.top_k, router.normalised, router.kind, *at, None)
        self.residents: Residents | None = None
        self._at = ctypes.addressof(self._layer)
        self._run, self._mix = called("foregate_layer", 14), called("foregate_layer_out", 2)
        self._settle, self._go_on = called("foregate_layer_settle", 5), called("foregate_layer_go_on", 16)
        self._told = (c_int64 * 3)()
        self._told_at = ctypes.addressof(self._told)
        self._experts, self._begin = called("foregate_experts", 9), called("foregate_experts_begin", 9)
        self._end = called("foregate_experts_end", 1)
        self._expert_places: Any = (c_void_p * (2 * MOST_EXPERTS))()
        places, width = ctypes.addressof(self._expert_places), attention.inputs
        self._experts_at = places, places + ctypes.sizeof(self._expert_places) // 2
        self._rows = [row.data_ptr() for row in made.parts]
        self._routed_at = at[2], width, width, BF16
        self.hidden = torch.zeros(1, 1, attention.inputs, dtype=torch.bfloat16)
        self.hidden_at = self.hidden.data_ptr()
        self.places = dict(zip(("pre_attention", "residual", "router_input"), at[:3], strict=True))
        """Where what signals tell of lies in memory, by its name there."""
        self._placed: dict[tuple[str, ...], tuple[tuple[int, ...], int] | None] = {}
        self._norm = loaded().foregate_rms_norm

    def placed(self, names: tuple[str, ...]) -> tuple[tuple[int, ...], int] | None:
        """Where the signals of these names lie, and in which format; None where one does not."""
        if names not in self._placed:
            known = all(name in self.places for name in names)
            self._placed[names] = (tuple(self.places[name] for name in names), BF16) if known else None
        return self._placed[names]

    def begin_residents(self, residents: Residents | None) -> None:
        """From now on have ``residents`` begun as soon as they are chosen; ``end_experts`` ends that. None: nobody."""
        self.residents = residents
        self._layer.there = None if residents is None else residents.at

    def settle(self, logits: Tensor, weights: Tensor, index: Tensor) -> bool:
        """Make what a router has told, [1, E], [1, k] and [1, k], the choice that a call could not tell; False, and the
        choice counts for nothing, where these are of another form."""
        made = self.choice
        pairs = (made.logits, logits), (made.weights, weights), (made.index, index)
        if any(ours.dtype is not theirs.dtype or ours.shape != theirs.shape for ours, theirs in pairs):
            return False
        given = [theirs if theirs.is_contiguous() else theirs.contiguous() for _, theirs in pairs]
        return self._settle(self._at, *(told.data_ptr() for told in given), num_threads()) == 0

    def mix(self) -> None:
        """Fill ``hidden`` with ``residual`` and ``choice.parts``, rows in the order of the chosen, by their weights."""
        check(self._mix(self._at, self.hidden_at))

    def experts(self, experts: Sequence[int], rows: Sequence[int], hidden: int) -> bool:
        """Fill ``rows`` of ``choice.parts`` with what ``experts`` (``FusedExpert.at``) of ``hidden`` numbers between
        their matrices give for ``routed``; False, and nothing done, where they are not of one form, or too many."""
        return self._ask(self._experts, experts, rows, hidden)

    def begin_experts(self, experts: Sequence[int], rows: Sequence[int], hidden: int) -> bool:
        """As ``experts``, which other threads compute until ``end_experts``; False, too, where there is none. What
        has begun must be ended; until then the experts stay as they are, and nobody looks at ``choice.parts``."""
        return self._ask(self._begin, experts, rows, hidden)

    def end_experts(self, number: int = 0) -> int:
        """Compute with the others what is left of what has begun: for how many nanoseconds anybody had until now.
        Negative, and nothing done, where that was dropped. ``number``: of ``residents``; 0: by ``begin_experts``."""
        return self._end(number)

    def go_on(self, number: int, following: Call) -> Gone | None:
        """``end_experts`` of ``number`` (0: of nothing), ``mix``, and the ``following`` layer for ``hidden``, at once.
        None, and nothing done, where what had begun was dropped."""
        layer, turns, place = following
        at = self._at, number, self.hidden_at, self._told_at, layer._at
        code = self._go_on(*at, *turns, *place, num_threads())
        if code == DROPPED:
            return None
        routed = layer._has_routed(code)
        computed, mix, taken = self._told
        return Gone(computed, mix, taken, routed)

    def leave_residents(self) -> None:
        """Nobody is sure to end what of ``residents`` has begun: others may have the threads for something else."""
        if self.residents is not None and self.residents.begun:
            called("foregate_experts_leave", 1)(self.residents.number)

    def drop_residents(self) -> None:
        """Whoever would end what of ``residents`` has begun will find it dropped. From any thread."""
        if self.residents is not None and self.residents.begun:
            called("foregate_experts_drop", 1)(self.residents.number)

    def _ask(self, run: Callable[..., int], experts: Sequence[int], rows: Sequence[int], hidden: int) -> bool:
        count, places = len(experts), self._expert_places
        if count > MOST_EXPERTS:
            return False
        places[:count] = experts
        places[MOST_EXPERTS : MOST_EXPERTS + count] = [self._rows[row] for row in rows]
        code = run(*self._experts_at, count, hidden, *self._routed_at, num_threads())
        if code in (REFUSED, NOBODY):
            return False
        check(code)
        return True

    def take(self, out: Tensor) -> None:
        """Fill ``hidden`` with ``residual`` and ``out`` [1, D], what the experts have given together."""
        torch.add(self.residual, out, out=self.hidden[0])

    def norm(self, x: int) -> None:
        """Fill ``normed`` for D numbers (bf16) at ``x`` in memory alone."""
        weight, small = self._before
        check(self._norm(x, weight.data_ptr(), self.normed.data_ptr(), 1, len(weight), small))

    def __call__(self, x: int, turns: Turns, place: tuple[int, ...], normed: bool) -> bool:
        """Fill ``residual``, ``routed`` and ``choice`` for D numbers (bf16) at ``x``: whether the choice counts,
        or the router cannot tell.

        ``place`` as ``AttentionBlock.attention`` takes them; ``normed``: ``norm`` has been called for ``x``.
        """
        return self._has_routed(self._run(self._at, x, normed, *turns, *place, num_threads()))

    def _has_routed(self, code: int) -> bool:
        if code == UNDECIDED:
            return False
        check(code)
        return True


Call = tuple[DecoderLayer, Turns, tuple[int, ...]]
"""A layer, and what it can be called with for any input: turns and place."""
