"""The arithmetic of the policy ``echo`` for one token and layer, compiled (``native/echo.h``). No torch.

Shapes: L layers, E experts of a layer, k chosen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import addressof, c_float, c_int32, c_void_p
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.native.library import function, load

Floats = NDArray[np.float32]

SEEN, INFINITE, NEGATIVE = 0, 3, 4
"""What ``EchoPast.see`` answers: done; scores that are not finite; scores that are logits and not said to be."""
MOST_CHOSEN = 64
_MEANS, _REACH = 4, 8
_FUNCTIONS = ("foregate_echo_see", "foregate_echo_judge", "foregate_echo_lowest")


class EchoRules(ctypes.Structure):
    """``echo_rules`` of echo.h."""

    _fields_ = [
        ("rates", c_float * _MEANS),
        ("fades", c_float * _REACH),
        *((name, c_float) for name in ("fades_total", "sharpness", "floor", "least")),
    ]


class _Past(ctypes.Structure):
    """``echo_past`` of echo.h."""

    _fields_ = [*((name, c_void_p) for name in ("shares", "keys", "after")), ("experts", c_int32), ("length", c_int32)]


def available() -> bool:
    """Whether the kernels are there, and not built from an older source."""
    return _library() is not None


class EchoPast:
    """Works on arrays of its caller: ``shares`` [5, E] (four means, room for votes), ``keys`` and ``after`` [2 n, E],
    the window with room to grow, of which the newest n + 1 rows count. ``weights``: of the logs of the five and a
    bias, [6] each."""

    def __init__(
        self, rules: EchoRules, shares: Floats, keys: Floats, after: Floats, weights: Sequence[Floats]
    ) -> None:
        experts = shares.shape[1]
        at = [array.ctypes.data for array in (shares, keys, after)]
        self._past = _Past(*at, experts, len(keys) // 2)
        self._scores, self._ids = np.zeros(experts, np.float32), np.zeros(MOST_CHOSEN, np.int64)
        self._worth = np.zeros(experts, np.float32)
        self._kept = rules, shares, keys, after, weights
        self._given = addressof(rules), addressof(self._past)
        self._from, self._named, self._to = (a.ctypes.data for a in (self._scores, self._ids, self._worth))
        self._weights = [array.ctypes.data for array in weights]
        self._own, self._advice = np.zeros(len(weights[0]), np.float32), np.zeros(experts, np.float32)
        self._advised = self._own.ctypes.data, self._advice.ctypes.data
        found = _library()
        self._see, self._judge = function(found, "foregate_echo_see", 7), function(found, "foregate_echo_judge", 6)

    def see(self, row: int, chosen: NDArray[np.int64], scores: Floats | None, *, logits: bool) -> int:
        """One more token of [k] experts, at most ``MOST_CHOSEN``, as ``row`` of the window, with the ``scores`` [E] of
        its router. Unless ``SEEN`` is the answer, nothing has changed."""
        count = len(chosen)
        self._ids[:count] = chosen
        if scores is not None:
            self._scores[:] = scores
        code: int = self._see(*self._given, row, None if scores is None else self._from, logits, self._named, count)
        if code == 2:
            raise MemoryError("no memory to keep a routing")
        return code

    def advise(self, advice: Floats, weights: Floats) -> None:
        """What ``worth`` of no kind goes by: ``weights`` [5] of the five and, in place of a bias, ``advice`` [E]."""
        self._advice[:] = advice
        self._own[:-1] = weights

    def worth(self, rows: int, kind: int | None) -> Floats:
        """By the ``kind``-th of the weights (None: as ``advise`` said), after ``rows`` rows of the window, [E]:
        overwritten by the next call."""
        by = self._advised if kind is None else (self._weights[kind], None)
        self._judge(*self._given, rows, *by, self._to)
        return self._worth


class Lowest:
    """The lowest of ``worth`` [L, E] less ``away`` [L, L] of the layer that has run last, where ``held`` [L, E]."""

    def __init__(self, worth: Floats, held: NDArray[np.bool_], away: Floats) -> None:
        self._kept = worth, held, away
        self.left = np.zeros_like(worth)
        """What was compared: infinite where nothing is held."""
        self._given = worth.ctypes.data, held.ctypes.data
        self._away = [row.ctypes.data for row in away]
        self._to, self._shape = self.left.ctypes.data, worth.shape
        self._run = function(_library(), "foregate_echo_lowest", 6)

    def __call__(self, layer: int) -> int:
        """Its place in ``left`` after ``layer`` has run (-1: none yet), or -1 if nothing is held."""
        found: int = self._run(*self._given, self._away[layer], *self._shape, self._to)
        return found


@cache
def _library() -> Any:
    return load("kernels", _FUNCTIONS)
