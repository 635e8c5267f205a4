"""Which layers a predictor speaks of when it is asked."""

from __future__ import annotations

from foregate.interfaces import Predictor
from foregate.types import Moment


def targets(predictor: Predictor, layer: int, layers: int) -> range:
    """MoE layers from the first that is not routed yet to ``layer + lookahead``; L and more are the next token's.

    At most L of them: a layer that lies a whole token away is no use to anybody.
    """
    first = layer + (predictor.moment is Moment.AFTER_ROUTING)
    return range(first, min(layer + predictor.lookahead + 1, first + layers))
