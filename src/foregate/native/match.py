"""The search of predictors that remember tokens or requests, in one compiled call (``native/match.h``). No torch.

Shapes: M stored, L layers, E experts of the widest, A layers that are told of.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_void_p

import numpy as np
from numpy.typing import NDArray

from foregate.native.asking import Ask, Place, Told
from foregate.native.matrix import RowsOf
from foregate.native.predict import Floats, loaded, pointer
from foregate.native.products import Rows
from foregate.types import Prediction

MOST_ALIKE = -1


class _Match(ctypes.Structure):
    """``match`` of match.h."""

    _fields_ = [
        ("columns", RowsOf),
        *((n, c_void_p) for n in ("likeness", "inverse", "known", "order", "shares", "targets", "counts", "near")),
        *((n, c_int32) for n in ("stored", "here", "layers", "experts", "asked", "named", "least")),
    ]


class MatchKernel:
    """``order`` and ``shares`` [M, L, E] of the stored one whose ``likeness`` [M], times ``inverse`` [L, M] (None: 1),
    is the largest, of the layers ``ahead`` [L] of each.

    Experts that a layer chose add ``columns`` [L, E, M], by their weights, to ``likeness``, and the squares of those
    weights to ``known`` [2], whose other number is the likeness of a match that is given. Told are the first ``least``
    of ``named`` experts, and on until their shares reach 1 - likeness; the shares fade with distance if ``fading``.
    ``experts`` [L] says how many of the E each layer has. All numbers are float32, ``order`` int32.
    """

    def __init__(
        self,
        columns: Rows,
        likeness: Floats,
        inverse: Floats | None,
        known: Floats,
        order: NDArray[np.int32],
        shares: Floats,
        experts: Sequence[int],
        ahead: Sequence[Sequence[int]],
        named: int,
        least: int,
        *,
        fading: bool,
    ) -> None:
        stored, layers, most = shares.shape
        named = min(named, most)
        assert order.flags.c_contiguous
        assert order.dtype == np.int32
        arrays = columns, likeness, inverse, known, order, shares
        self._ask: list[Ask] = []
        for layer, further in enumerate(ahead):
            targets = np.array([target % layers for target in further], np.int32)
            counts = np.array([experts[target] for target in targets], np.int32)
            near = np.array([1 - (target - layer) / layers if fading else 1 for target in further], np.float32)
            made = _Match(
                columns.given[layer], pointer(likeness), None if inverse is None else pointer(inverse[layer]),
                pointer(known), order.ctypes.data, pointer(shares), targets.ctypes.data, counts.ctypes.data,
                pointer(near), stored, experts[layer], layers, most, len(targets), named, least,
            )  # fmt: skip
            told = Told(len(targets), named, list(zip(further, counts.tolist(), strict=True)))
            kept = arrays, made, targets, counts, near
            ask = told.asked_of(loaded(), "foregate_predict_match", ctypes.addressof(made), given=4, kept=kept)
            self._ask.append(ask)

    def __call__(
        self, layer: int, ids: Place = None, weights: Place = None, count: int = 0, match: int = MOST_ALIKE
    ) -> list[Prediction]:
        """What is told at ``layer``, of the stored ``match``, after the ``count`` experts ``ids`` (int64) with
        ``weights`` (float32) that it chose have been noted; those that do not exist are passed over."""
        return self._ask[layer](ids, weights, count, match, 1)
