"""Products of predictors: the compiled ones are those of the rounded weights, numpy's those of the weights."""

from __future__ import annotations

import numpy as np
import pytest

from foregate.native import products
from foregate.native.kernels import use_threads
from foregate.native.matrix import INT4
from foregate.native.products import GROUP, Products, Rows, to_int8

SHAPES = [(1, 1, 1), (3, 5, 7), (2, 33, 256), (1, 600, 64), (2, 64, 1030)]


def weights(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(shape[1]).standard_normal(shape).astype(np.float32)


def test_rounding_is_to_the_nearest_of_255_steps_of_a_row() -> None:
    values = np.concatenate([weights((1, 40, 50))[0], np.zeros((1, 50), np.float32)])
    rounded, scales = to_int8(values)
    assert np.abs(rounded).max(axis=1).tolist() == [127] * 40 + [0]
    assert (np.abs(rounded * scales[:, None] - values) <= scales[:, None] / 2 * 1.001).all()


@pytest.mark.skipif(products._linear() is None, reason="the kernels are not built")
@pytest.mark.parametrize("shape", SHAPES)
def test_every_matrix_gives_its_own_product(shape: tuple[int, int, int]) -> None:
    given = weights(shape)
    made = Products(given.transpose(0, 2, 1).copy().transpose(0, 2, 1))  # strides of their own
    x = np.random.default_rng(1).standard_normal(shape[2]).astype(np.float32)
    for number, matrix in enumerate(given):
        rounded, scales = to_int8(matrix)
        expected = (rounded * scales[:, None].astype(np.float64)) @ x.astype(np.float64)
        np.testing.assert_allclose(made(number, x), expected, rtol=1e-4, atol=5e-3)  # inputs are rounded to 16 bits
    assert (made.size, made.nbytes) == (shape[1] * shape[2], shape[1] * shape[2] + 4 * shape[1])


@pytest.mark.skipif(products._linear() is None, reason="the kernels are not built")
@pytest.mark.parametrize("shape", SHAPES)
def test_four_bits_stay_within_half_a_step_of_each_group(shape: tuple[int, int, int]) -> None:
    given = weights(shape)
    given[:, 0] = 0
    made = Products(given, INT4)
    for number, matrix in enumerate(given):
        for column in {0, shape[2] // 2, shape[2] - 1}:  # one column at a time: what the kernel holds in its place
            got = made(number, np.eye(1, shape[2], column, dtype=np.float32)[0])
            group = matrix[:, column // GROUP * GROUP : (column // GROUP + 1) * GROUP]
            step = np.abs(group).max(axis=1) / 7
            assert (np.abs(got - matrix[:, column]) <= 0.53 * step).all()  # scales are rounded to bf16
    assert made.size == shape[1] * shape[2]
    assert made.nbytes == -shape[1] // 16 * -16 * (-shape[2] // 64) * -(32 + 2)


@pytest.mark.skipif(products._linear() is None, reason="the kernels are not built")
def test_threads_change_no_bit() -> None:
    made, x = Products(weights((1, 2048, 600))), np.ones(600, np.float32)
    try:
        use_threads(1)
        alone = made(0, x).copy()
        use_threads(2)
        np.testing.assert_array_equal(made(0, x), alone)
    finally:
        use_threads(None)


def test_without_kernels_weights_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_linear", lambda: None)
    given = weights((3, 20, 9))
    made, x = Products(given), np.arange(9, dtype=np.float32)
    for number, matrix in enumerate(given):
        np.testing.assert_allclose(made(number, x), matrix @ x, rtol=1e-5, atol=1e-5)
    assert made.nbytes == 4 * 20 * 9


def test_rows_keep_every_column_within_half_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    given = weights((3, 20, 9)) * np.logspace(-3, 3, 9, dtype=np.float32)  # columns of sizes of their own
    made = Rows(given)
    for number, matrix in enumerate(given):
        steps = np.abs(matrix).max(axis=0) / (254 if made.given else np.inf)
        assert (np.abs(made.of(number, np.arange(20)) - matrix) <= 1.001 * steps).all()
    monkeypatch.setattr(products, "_linear", lambda: None)
    np.testing.assert_array_equal(Rows(given).of(2, np.array([7, 0])), given[2, [7, 0]])
