"""Products of predictors: the compiled ones are those of the rounded weights, numpy's those of the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foregate.native import products
from foregate.native.kernels import use_threads
from foregate.native.products import Products, to_bf16

SHAPES = [(1, 1, 1), (3, 5, 7), (2, 33, 256), (1, 600, 64), (2, 64, 1030)]


def weights(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(shape[1]).standard_normal(shape).astype(np.float32)


def test_rounding_is_that_of_torch() -> None:
    values = np.concatenate(
        [weights((1, 40, 50)).ravel(), np.array([0, -0.0, 1.00390625, 1.01171875, 1e-40, 3e38], np.float32)]
    )
    there = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bf16(values), there)


@pytest.mark.skipif(products._linear() is None, reason="the kernels are not built")
@pytest.mark.parametrize("shape", SHAPES)
def test_every_matrix_gives_its_own_product(shape: tuple[int, int, int]) -> None:
    given = weights(shape)
    made = Products(given.transpose(0, 2, 1).copy().transpose(0, 2, 1))  # strides of their own
    x = np.random.default_rng(1).standard_normal(shape[2]).astype(np.float32)
    for number, matrix in enumerate(given):
        rounded = torch.from_numpy(matrix).bfloat16().double().numpy()
        np.testing.assert_allclose(made(number, x), rounded @ x.astype(np.float64), rtol=1e-4, atol=1e-4)
    assert (made.size, made.nbytes) == (shape[1] * shape[2], 2 * shape[1] * shape[2])


@pytest.mark.skipif(products._linear() is None, reason="the kernels are not built")
def test_threads_change_no_bit() -> None:
    made, x = Products(weights((1, 1024, 600))), np.ones(600, np.float32)
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
