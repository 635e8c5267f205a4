"""The compiled kernels (``native/kernels.c``) by ctypes: matrices, experts, what a decode step does between them.

None where not built.

Shapes: T tokens, D hidden, F expert hidden, N rows, K columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foregate.errors import IntegrityError
from foregate.native.asking import Ask, Told, refuse
from foregate.native.library import function, load
from foregate.native.matrix import BF16, F32, INT4, INT8, threads_asked
from foregate.native.matrix import MOST_COLUMNS as MOST_COLUMNS
from foregate.native.matrix import Matrix as Matrix
from foregate.native.matrix import use_threads as use_threads
from foregate.types import Prediction

MOST_TOKENS = 8
"""Tokens up to which the kernels run; more are cheaper as one product of matrices."""

MOST_EXPERTS = 64
"""Experts that are computed in one call at most."""

_FORMATS = {torch.bfloat16: BF16, torch.int8: INT8, torch.uint8: INT4}
ACTIVATIONS = {torch.bfloat16: BF16, torch.float32: F32}
"""Dtypes of inputs and outputs."""


FUNCTIONS = tuple(
    f"foregate_{name}"
    for name in (
        "expert", "experts", "experts_begin", "experts_end", "experts_leave", "experts_drop", "helped", "linear",
        "rms_norm", "combine", "attend", "qkv", "attend_out", "attention", "expand", "rank", "route", "layer",
        "layer_settle", "layer_out", "layer_go_on", "head", "best", "read", "kernels",
    )
)  # fmt: skip

_MOST_VALUES, _MOST_WIDTH = 16384, 1024
"""Of decode.h."""

MOST_RANKED, REFUSED, UNDECIDED, NOBODY, DROPPED = 4096, 1, 3, 5, -1
"""Experts of a router at most; the answers to what a kernel does not take, where experts tie, where no other thread
computes, and where what had begun was dropped."""


def num_threads() -> int:
    """Threads that the kernels compute with. Their results do not depend on it."""
    return threads_asked() or torch.get_num_threads()


class _Expert(ctypes.Structure):
    """``expert`` of kernels.c."""

    _fields_ = [("gate", Matrix), ("up", Matrix), ("down", Matrix)]


class _Attention(ctypes.Structure):
    """``attention`` of decode.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "out", "scores")),
        *((name, c_int32) for name in ("group", "positions", "width", "out_width")),
        *((name, c_int64) for name in ("k_head", "k_row", "v_head", "v_row")),
        ("scale", c_float),
    ]


class _Ranking(ctypes.Structure):
    """``ranking`` of route.h."""

    _fields_ = [
        ("gate", Matrix),
        ("norm", c_void_p),
        ("epsilon", c_float),
    ]


def matrix(values: Tensor, scales: Tensor | None) -> Matrix:
    """``values`` as ``checkpoint.quantise`` stores them, or bf16 [N, K]. Raises KeyError for another dtype."""
    kind = _FORMATS[values.dtype]
    if kind == INT4:
        assert scales is not None
        rows, columns = values.shape[0] * 16, values.shape[1] * 8
        return Matrix(values.data_ptr(), scales.data_ptr(), kind, rows, columns, columns // scales.shape[1])
    pointer = None if scales is None else scales.data_ptr()
    return Matrix(values.data_ptr(), pointer, kind, values.shape[0], values.shape[1], 0)


@cache
def library() -> ctypes.CDLL | None:
    """The kernels with their signatures, or None: then torch computes."""
    found = load("kernels", FUNCTIONS)
    if found is None:
        return None
    pointer: Any = POINTER(Matrix)
    tail: list[Any] = [c_int, c_void_p, c_int, c_int, c_int, c_void_p, c_int, c_int, c_int]
    found.foregate_expert.argtypes = [pointer, pointer, pointer, *tail]
    found.foregate_linear.argtypes = [pointer, *tail[1:]]
    found.foregate_rms_norm.argtypes = [c_void_p, c_void_p, c_void_p, c_int, c_int, c_float]
    found.foregate_attend.argtypes = [POINTER(_Attention), c_int, c_int]
    found.foregate_qkv.argtypes = [c_void_p] * 4 + [c_int] + [c_void_p] * 3 + [c_int]
    strided: list[Any] = [c_void_p, c_int64, c_int64]
    found.foregate_attend_out.argtypes = [c_void_p, c_void_p, *strided, *strided, c_int, c_void_p, c_int]
    turned: list[Any] = [c_void_p, c_void_p, c_void_p, c_int]
    found.foregate_attention.argtypes = [c_void_p, *turned, *strided, *strided, c_int, c_void_p, c_int]
    found.foregate_expand.argtypes = [pointer, c_void_p, c_int, c_int, c_int]
    found.foregate_route.argtypes = [pointer, c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p, c_int]
    found.foregate_read.argtypes = [c_void_p, c_size_t, c_int]
    found.foregate_read.restype = c_uint64
    found.foregate_kernels.argtypes = [c_int]
    found.foregate_kernels.restype = c_char_p
    return found


def loaded() -> ctypes.CDLL:
    """``library()`` where there is one."""
    found = library()
    assert found is not None
    return found


@cache
def called(name: str, count: int) -> Callable[..., int]:
    """Function ``name`` of the kernels: see ``library.function``."""
    return function(loaded(), name, count)


def instructions() -> str:
    """Which instructions the kernels use on this processor; ``torch`` where there are no kernels."""
    found = library()
    return "torch" if found is None else str(found.foregate_kernels(-1).decode())


class FusedExpert:
    """One expert in a slot: down(silu(gate x) · up x), for up to ``MOST_TOKENS`` tokens. Raises as ``matrix``."""

    def __init__(
        self, gate_up: Tensor, gate_up_scale: Tensor | None, down: Tensor, down_scale: Tensor | None, hidden: int
    ) -> None:
        self._kept = (gate_up, gate_up_scale, down, down_scale)
        gate, up = gate_up.chunk(2)
        scales = (None, None) if gate_up_scale is None else gate_up_scale.chunk(2)
        self._parts = tuple(matrix(*pair) for pair in ((gate, scales[0]), (up, scales[1]), (down, down_scale)))
        self._whole = _Expert(*self._parts)
        self.at = ctypes.addressof(self._whole)
        """Where its matrices are told of."""
        self.form = tuple((m.dtype, m.rows, m.columns, m.group) for m in self._parts)
        """Experts of equal form can be computed ``together``."""
        self.hidden = hidden
        self._run = loaded().foregate_expert

    def __call__(self, x: Tensor) -> Tensor:
        """Output [T, D] for ``x`` [T, D], in the dtype of ``x`` (see ``ACTIVATIONS``)."""
        tokens, width = x.shape
        x = x.contiguous()
        out = torch.empty_like(x)
        kind = ACTIVATIONS[x.dtype]
        threads = num_threads()
        code = self._run(
            *self._parts, self.hidden, x.data_ptr(), width, kind, tokens, out.data_ptr(), width, kind, threads
        )
        check(code)
        return out

    @staticmethod
    def together(experts: Sequence[FusedExpert], x: Tensor, into: Tensor, rows: Sequence[int]) -> None:
        """Write the outputs of up to ``MOST_EXPERTS`` experts of one form for one token ``x`` [1, D], as one by one, to
        ``rows`` of ``into`` [k, D], contiguous and of the dtype of ``x``."""
        first, count, kind = experts[0], len(experts), ACTIVATIONS[x.dtype]
        x = x.contiguous()
        width, base, step = x.shape[1], into.data_ptr(), into.stride(0) * into.element_size()
        places = (c_void_p * (2 * count))(*[one.at for one in experts], *[base + row * step for row in rows])
        at = ctypes.addressof(places)
        code = called("foregate_experts", 9)(
            at, at + ctypes.sizeof(places) // 2, count, first.hidden, x.data_ptr(), width, width, kind, num_threads()
        )
        check(code)


def drop_begun_experts() -> None:
    """What this thread has had others begin, and an interrupt kept from its end, is over; nobody works for it."""
    if library() is not None:
        called("foregate_experts_drop", 1)(0)


def helped_s() -> float:
    """Seconds that this thread, when it waited for a prediction last, has spent on what others had begun; told once."""
    return 0.0 if library() is None else called("foregate_helped", 1)(0) * 1e-9


def linear(weight: Matrix, x: Tensor, width: int) -> Tensor:
    """Output [T, width] = x [T, K] · weightᵀ in the dtype of ``x``, for up to ``MOST_TOKENS`` tokens."""
    x = x.contiguous()
    tokens, inputs = x.shape
    out = x.new_empty(tokens, width)
    kind, threads = ACTIVATIONS[x.dtype], num_threads()
    run = loaded().foregate_linear
    check(run(weight, x.data_ptr(), inputs, kind, tokens, out.data_ptr(), width, kind, threads))
    return out


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``weight`` [D] times ``x`` [..., D] divided by its root mean square; bf16, contiguous, D a multiple of 16."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    check(loaded().foregate_rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, width, epsilon))
    return out


def combines(x: Tensor, weights: Tensor) -> bool:
    """Whether ``combine`` takes outputs like ``x`` [1, D] with ``weights`` [1, k]."""
    fits = x.dtype is torch.bfloat16 and x.shape[1] % 16 == 0 and weights.shape[1] <= MOST_EXPERTS
    return fits and weights.dtype in ACTIVATIONS and weights.is_contiguous() and library() is not None


def combine(parts: Tensor, weights: Tensor) -> Tensor:
    """Sum [1, D] of the rows of ``parts`` [k, D] (contiguous) times ``weights`` [1, k], rounded once."""
    rows, width = parts.shape
    out = torch.empty((1, width), dtype=torch.bfloat16)
    run, kind = called("foregate_combine", 6), ACTIVATIONS[weights.dtype]
    check(run(parts.data_ptr(), weights.data_ptr(), kind, rows, width, out.data_ptr()))
    return out


class Ranker:
    """Rows of ``gate`` (bf16 [E, D], contiguous) by their products with one token, after ``norm`` if there is one.

    One call and one thread: a router is small, and waking a second costs more than it saves. ``norm``: weight [D] and
    epsilon of ``rms_norm``. Scores are rounded to bf16, as a router's are.
    """

    def __init__(self, gate: Tensor, norm: tuple[Tensor, float] | None, top_k: int) -> None:
        weight, epsilon = norm or (None, 0.0)
        self._kept = gate, weight
        self._job = _Ranking(matrix(gate, None), None if weight is None else weight.data_ptr(), epsilon)
        self.rows, self.width = gate.shape
        self.normed = norm is not None
        self._top_k = top_k
        self._scores, self._order = np.empty(self.rows, np.float32), np.empty(self.rows, np.int32)
        self._to = self._scores.ctypes.data, self._order.ctypes.data
        self._run = called("foregate_rank", 8)
        self._asks: dict[tuple[int, int, int], Ask] = {}

    def __call__(self, x: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Rows best first and their scores for ``x`` [1, D]; None where it does not suit, or the ``top_k``-th ties."""
        if x.dtype is not torch.bfloat16 or x.shape[-1] != self.width or not x.is_contiguous():
            return None
        code = self._run(ctypes.addressof(self._job), self._top_k, self.rows, None, x.data_ptr(), *self._to, 1)
        if code == UNDECIDED:
            return None
        check(code)
        return self._order.astype(np.int64), self._scores.copy()

    def best(self, layer: int, at: int, most: int, shift: int = 0) -> Prediction | None:
        """The best ``most`` for a token whose [D] lie ``at`` an address, as experts of ``layer``; None as above.
        ``shift``: where a ``native.shift.Shift`` lies that is added to the token before."""
        return _one(self._asked(layer, most, shift)(at, 1))

    def begin(
        self, layer: int, at: int, most: int, shift: int = 0, kept: object = None
    ) -> Callable[[], Prediction | None]:
        """As ``best``, but what this returns tells, and another compute thread does it meanwhile; ``kept`` lives as
        long as that takes."""
        ask = self._asked(layer, most, shift)
        begun = ask.begin(kept, at, num_threads())
        return lambda: _one(begun())

    def _asked(self, layer: int, most: int, shift: int) -> Ask:
        """Who asks: another where a question is open."""
        ask = self._asks.get((layer, most, shift))
        if ask is None or ask.open:
            room = min(max(most, self._top_k + 1), self.rows)
            given = ctypes.addressof(self._job), self._top_k, most, shift
            told = Told(1, room, [(layer, min(most, self.rows))])
            kept = self._job, self._kept
            ask = told.asked_of(loaded(), "foregate_rank", *given, given=1, kept=kept, refused=_undecided)
            self._asks.setdefault((layer, most, shift), ask)
        return ask


def _undecided(answer: int) -> list[Prediction]:
    return [] if answer == UNDECIDED else refuse(answer)


def _one(told: list[Prediction]) -> Prediction | None:
    return told[0] if told else None


def attends(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether ``attend`` takes these."""
    heads, width, out_width = query.shape[1], query.shape[3], value.shape[3]
    group = heads // key.shape[1]
    return (
        query.dtype is key.dtype is value.dtype is torch.bfloat16
        and query.shape[:3:2] == (1, 1)
        and key.shape[:3] == value.shape[:3]
        and group * key.shape[1] == heads
        and width % 16 == out_width % 16 == 0
        and max(width, out_width) <= _MOST_WIDTH
        and group * max(width, out_width) <= _MOST_VALUES
        and key.stride(3) == value.stride(3) == 1
    )


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of one token: [1, 1, H, W] for ``query`` [1, H, 1, V], ``key`` [1, G, S, V], ``value`` [1, G, S, W].

    Every position is seen. Inputs as ``attends`` wants them.
    """
    query = query.contiguous()
    _, heads, _, width = query.shape
    _, shared, positions, out_width = value.shape
    out = query.new_empty(1, 1, heads, out_width)
    _, k_head, k_row, _ = key.stride()
    _, v_head, v_row, _ = value.stride()
    job = _Attention(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), None, heads // shared, positions, width,
        out_width, k_head, k_row, v_head, v_row, scale,
    )  # fmt: skip
    check(loaded().foregate_attend(job, shared, num_threads()))
    return out


def expand(weight: Matrix, out: Tensor) -> Tensor:
    """Write the first rows and columns of an int8 or int4 ``weight`` to ``out`` (bf16, contiguous, [N, K])."""
    rows, width = out.shape
    check(loaded().foregate_expand(weight, out.data_ptr(), rows, width, num_threads()))
    return out


def check(code: int) -> None:
    """Raise MemoryError or IntegrityError for what a kernel has returned."""
    if code == 2:
        raise MemoryError("no memory for the inputs of an expert")
    if code:
        raise IntegrityError("the kernels refused the shape or the dtype of a matrix")
