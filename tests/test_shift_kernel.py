"""What ``quasi-hidden`` adds to a hidden state inside the call that asks a router ahead: the choice, where it lies."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.interfaces import Signals
from foregate.native import kernels
from foregate.native.products import Rows
from foregate.native.shift import Shift
from foregate.predictors.file import Artifact
from foregate.predictors.fitted import NOBODY
from foregate.predictors.quasi_hidden import QuasiHidden
from foregate.testing.tiny import build
from foregate.types import Prediction, RoutingStep
from test_predict_kernels import MODEL, D, E, K, L, States, level, needs_kernels, some, step

__all__ = ["level"]


class Shifted(States):
    """Tells where ``quasi-hidden`` has the router's kernel look, and what is there."""

    def __init__(self, told: RoutingStep, *, place: bool) -> None:
        super().__init__(1, 0, place=place, told=told)

    def begin_shifted(self, target: int, shift: Shift, most: int) -> Callable[[], Prediction]:
        given = shift._layers[self.layer]
        ids = np.ctypeslib.as_array((ctypes.c_int64 * given.count).from_address(given.ids))
        weights = np.ctypeslib.as_array((ctypes.c_float * given.count).from_address(given.weights))
        return lambda: Prediction(target, tuple(ids.tolist()), tuple(weights.tolist()))


@needs_kernels
def test_quasi_hidden_reads_each_choice_where_it_lies_or_from_its_own_copy() -> None:
    arrays = {"experts": some(L, E, D), "rest": some(L, D)}
    predictor = QuasiHidden.from_file(Artifact("quasi-hidden", MODEL, 1, arrays), 1)
    placed, copied, longer, shorter = step(1, 0), step(1, 4), step(1, 3), step(1, 2)
    assert [one.experts.shape[1] - K for one in (placed, copied, longer, shorter)] == [0, 0, 1, -1]
    for told, place in ((placed, True), (copied, False), (placed, True), (longer, True), (shorter, True)):
        predictor.observe(told)
        (prediction,) = predictor.predict(Shifted(told, place=place))
        ids, weights = told.experts[0, :K].tolist(), told.weights[0, :K].tolist()
        assert prediction.experts == (*ids, *[NOBODY] * (K - len(ids)))
        assert prediction.scores[: len(ids)] == tuple(weights)
    several = replace(placed, experts=placed.experts.repeat(3, axis=0), weights=placed.weights.repeat(3, axis=0))
    predictor.observe(several)
    assert list(predictor.predict(Shifted(several, place=True))) == [], "nobody is asked about several tokens"


@needs_kernels
@pytest.mark.parametrize("width", [D, D + 32])
def test_a_router_is_asked_on_what_the_chosen_experts_add(width: int, level: None) -> None:
    rows, base = Rows(some(2, 6, D)), some(2, D, seed=1)
    ids, weights = np.array([3, -1, 0, 6], np.int64), some(4, seed=2)
    shift = Shift(rows, base, ids, weights)
    ranker = kernels.Ranker(torch.from_numpy(some(9, width)).bfloat16(), (torch.ones(width).bfloat16(), 1e-6), 2)
    x = torch.from_numpy(some(1, width, seed=3)).bfloat16()
    for layer in (0, 1):
        guess = x.float()
        guess[0, :D] += torch.from_numpy(weights[[0, 2]] @ rows.of(layer, ids[[0, 2]]) + base[layer])
        expected = ranker(guess.bfloat16())
        assert expected is not None
        for most in (3, 9):
            told = ranker.best(5, x.data_ptr(), most, shift.place(layer))
            end = ranker.begin(5, x.data_ptr(), most, shift.place(layer))
            assert told is not None
            assert told == end()
            assert told.experts == tuple(expected[0][:most].tolist())
            np.testing.assert_allclose(told.scores, expected[1][:most], rtol=0.02)


class Both(QuasiHidden):
    """Compares what the compiled router says with what is computed from ``normed`` and ``scores``."""

    compiled = 0

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        told = super().predict(signals)
        for prediction in told:
            plain = self._guess(signals, prediction.layer)
            asked = self._asked(signals, prediction.layer)
            self.compiled += asked is not None and asked() == prediction
            assert len(prediction.experts) == self.named
            scores = dict(zip(plain.experts, plain.scores, strict=True))
            for expert, score in zip(prediction.experts, prediction.scores, strict=True):
                assert scores.get(expert, plain.scores[-1]) == pytest.approx(score, rel=0.02, abs=0.02)
        return told


@needs_kernels
def test_a_compiled_quasi_hidden_state_is_the_one_of_the_live_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foregate.engine.dense.SMALLEST", 1)
    model = build("qwen3_moe", tmp_path / "model", dtype="bfloat16", hidden_size=128, num_hidden_layers=4)
    config = RunConfig(model=str(model), predictor="next-gate", memory_budget="50%", prefetch="2")
    with Engine(config) as engine:  # a fixed limit: on a busy disk the controller would not ask
        there, spec = engine._identity(), engine.spec
        arrays = {
            "experts": some(there.layers, max(there.experts), there.hidden_size),
            "rest": some(there.layers, there.hidden_size),
        }
        both = engine.runtime.predictor = Both(Artifact("quasi-hidden", there, 2, arrays), 2)
        both.name_at_most(4)
        list(engine.stream([5, 9, 30, 7, 7, 12], SamplingConfig(max_new_tokens=12)))
        assert both.compiled >= spec.layers
        assert not engine.prefetcher.controller.off_reason
