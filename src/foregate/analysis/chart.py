"""Charts as data: matplotlib (figures) and the report's script draw the same description, so they cannot disagree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Series:
    """One curve. ``y`` has None where there is no value; ``low`` and ``high`` bound a 95 % interval."""

    name: str
    x: list[float]
    y: list[float | None]
    low: list[float | None] | None = None
    high: list[float | None] | None = None
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Lines:
    """Curves over a common axis; ``log`` makes the x axis logarithmic (base 2)."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: list[Series]
    log: bool = False


@dataclass(frozen=True, slots=True)
class Heat:
    """A matrix [R, C]; NaN cells are left empty. Rows and columns are numbered from 0 unless named."""

    name: str
    title: str
    x_label: str
    y_label: str
    value_label: str
    values: NDArray[np.float64]
    rows: list[str] | None = None
    columns: list[str] | None = None


@dataclass(frozen=True, slots=True)
class Matrices:
    """Many [E, E] matrices of numbers from 0 to 1, one at a time in the report: P(b in layer m | a in layer l).

    ``cells`` maps "l,m" to bytes; a byte v stands for (v / 255)², which keeps small numbers apart.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    sizes: list[int]
    cells: dict[str, bytes]


Chart = Lines | Heat | Matrices


def numbers(values: Any) -> list[float | None]:
    """Floats for a series; NaN becomes None."""
    return [None if value is None or not np.isfinite(value) else float(value) for value in values]
