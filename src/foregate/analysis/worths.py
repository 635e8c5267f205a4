"""What the policy ``echo`` knows after each routing decision: worked out once, for replays through caches of any size.

Its knowledge depends on the routing alone, not on what a cache holds. Shapes: T tokens, k chosen, E experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foregate.experts.echo import Echo

ECHO = "echo"


class Worths:
    """Asked in execution order. ``scored``: whether router scores were at hand every time; else choices alone."""

    def __init__(self) -> None:
        self._echo = Echo()
        self.scored = True

    def of(self, layer: int, experts: NDArray[np.int32], scores: NDArray[np.float16] | None) -> NDArray[np.float32]:
        """For ``Echo.tell``, [E or fewer], once the router of ``layer`` chose ``experts`` [T, k] (-1: none).

        ``scores`` [T, E] are those of all its experts; None, or not finite, where there are none.
        """
        wide = None if scores is None else scores.astype(np.float32)
        if wide is None or not np.isfinite(wide).all():
            wide, self.scored = None, False
        self._echo.observe(layer, experts.astype(np.int64), wide)
        return self._echo.worth(layer)
