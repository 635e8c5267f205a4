"""The compiled search of what is remembered: the match, the experts and the scores that numpy finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from foregate.errors import IntegrityError
from foregate.native import match
from foregate.predictors.eam import SCOPES, ExpertActivation
from foregate.predictors.expert_map import ExpertMap
from foregate.predictors.file import Artifact
from foregate.types import Prediction
from test_predict_kernels import (
    EXPERTS,
    MODEL,
    D,
    E,
    K,
    L,
    States,
    level,
    needs_kernels,
    predictions,
    some,
    step,
    without_kernel,
)  # fmt: skip

__all__ = ["level"]

M = 37


def shares(seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[M, L, E] that sum to 1, nothing for what is no expert of a layer."""
    found = np.abs(some(M, L, E, seed=seed)) ** 3
    for layer, there in enumerate(EXPERTS):
        found[:, layer, there:] = 0
    return (found / found.sum(axis=2, keepdims=True)).astype(np.float32)


def expert_map(hops: int = 2, semantic: int = 1) -> Any:
    arrays, options = {"maps": shares(), "inputs": some(M, D)}, {"semantic_layers": semantic}
    return ExpertMap.from_file(Artifact("expert-map", MODEL, hops, arrays, options), hops)


def eam(scope: str, hops: int = 2) -> Any:
    return ExpertActivation.from_file(Artifact("eam", MODEL, hops, {"library": shares()}, {"scope": scope}), hops)


MADE: dict[str, Callable[[], Any]] = {
    "expert-map": expert_map,
    "expert-map-by-routing": lambda: expert_map(semantic=0),
    "expert-map-by-input": lambda: expert_map(semantic=L),
    "expert-map-far": lambda: expert_map(L + 2),
    **{f"eam-{scope}": partial(eam, scope) for scope in SCOPES},
}

every_method = pytest.mark.parametrize("made", MADE.values(), ids=MADE.keys())


def alike(ours: Sequence[Prediction], theirs: Sequence[Prediction]) -> None:
    assert len(ours) == len(theirs) > 8
    for one, other in zip(ours, theirs, strict=True):
        assert (one.layer, one.experts) == (other.layer, other.experts)
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5)


@needs_kernels
@every_method
@pytest.mark.parametrize("rare", [1, 2])
@pytest.mark.parametrize("place", [False, True])
def test_what_is_told_is_numpys(made: Callable[[], Any], rare: int, place: bool, level: None) -> None:
    def told(predictor: Any) -> list[Prediction]:
        return list(predictions(predictor, place=place, asked=lambda turn: turn % rare == 0))

    alike(told(made()), told(without_kernel(made())))


@needs_kernels
@every_method
@pytest.mark.parametrize("count", [1, 5, 6, 30])
def test_a_shorter_answer_is_numpys(made: Callable[[], Any], count: int) -> None:
    short, plain = made(), made()
    for predictor in (short, plain):
        predictor.name_at_most(count)
    told = list(predictions(short))
    alike(told, list(predictions(without_kernel(plain))))
    assert all(len(prediction.experts) <= count for prediction in told)


@needs_kernels
def test_how_many_are_told_depends_on_the_match(level: None) -> None:
    lengths = {len(prediction.experts) for prediction in predictions(expert_map())}
    assert len(lengths) > 2
    assert min(lengths) >= K


@needs_kernels
@every_method
def test_nothing_of_a_sequence_is_left_in_the_next(made: Callable[[], Any]) -> None:
    predictor = made()
    first = list(predictions(predictor))
    predictor.observe(step(0, 9))
    predictor.reset()
    assert list(predictions(predictor)) == first


@needs_kernels
@every_method
def test_an_answer_of_another_length_is_of_the_same_search(made: Callable[[], Any]) -> None:
    predictor, whole = made(), made()
    told = predictions(predictor)
    first = [next(told) for _ in range(12)]
    predictor.name_at_most(3)
    rest = [(one.layer, one.experts) for one in told]
    expected = list(predictions(whole))
    assert first == expected[:12]
    assert rest == [(one.layer, one.experts[:3]) for one in expected[12:]]


@needs_kernels
@every_method
def test_nothing_is_told_where_nothing_is_asked_for(made: Callable[[], Any]) -> None:
    predictor = made()
    predictor.lookahead = 0
    predictor.name_at_most(E)
    assert not list(predictions(predictor))


@needs_kernels
def test_answers_end_alike_without_pythons_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(predictions(expert_map(), place=True))
    for module in ("asking", "library", "products"):
        monkeypatch.setattr(f"foregate.native.{module}.calls", lambda: None)
    assert list(predictions(expert_map(), place=True)) == expected


@needs_kernels
@pytest.mark.parametrize("damage", [{"stored": 0}, {"experts": 1}, {"named": E + 1}, {"asked": 0}, {"least": 0}])
def test_sizes_that_cannot_be_are_refused(damage: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def spoilt(*fields: Any) -> Any:
        kept = plain(*fields)
        made.append(kept)
        return kept

    plain = match._Match
    monkeypatch.setattr(match, "_Match", spoilt)
    predictor = expert_map(semantic=0)
    for one in made:
        for name, value in damage.items():
            setattr(one, name, value)
    predictor.observe(step(0, 0))
    with pytest.raises(IntegrityError, match="refused"):
        predictor.predict(States(0, 0))
