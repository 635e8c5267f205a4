"""The null predictor: says nothing, so nothing is read ahead. The baseline of every other one."""

from __future__ import annotations

from foregate.predictors.base import BasePredictor


class NonePredictor(BasePredictor):
    """Never predicts."""

    name = "none"
    source = "control: no prediction"
