"""Sketches: exact while everything fits, within their bounds beyond."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foregate.analysis.sketch import BottomK, HeavyHitters, hash_rows


def fed(items: np.ndarray, capacity: int, batch: int) -> tuple[HeavyHitters, BottomK]:
    heavy, sample = HeavyHitters(capacity, 1), BottomK(capacity)
    for begin in range(0, len(items), batch):
        rows = items[begin : begin + batch, None].astype(np.int32)
        hashes, first, counts = np.unique(hash_rows(rows), return_index=True, return_counts=True)
        heavy.add(hashes, counts, rows[first])
        sample.add(hashes, counts)
    return heavy, sample


@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), st.integers(1, 60), st.integers(1, 50))
@settings(max_examples=80, deadline=None)
def test_heavy_hitters_are_at_most_error_too_low(items: list[int], capacity: int, batch: int) -> None:
    heavy, _ = fed(np.array(items), capacity, batch)
    held = {int(row[0]): int(count) for row, count in zip(heavy.examples, heavy.counts, strict=True)}
    assert len(held) <= capacity
    assert heavy.error <= len(items) / (capacity + 1)
    for item in set(items):
        assert items.count(item) - heavy.error <= held.get(item, 0) <= items.count(item)


def test_distinct_items_are_exact_below_the_capacity_and_close_above() -> None:
    rng = np.random.default_rng(0)
    items = rng.integers(0, 20_000, 100_000)
    _, exact = fed(items, 30_000, 5_000)
    assert exact.exact
    assert exact.distinct == len(np.unique(items))
    _, estimate = fed(items, 1_000, 5_000)
    assert not estimate.exact
    assert estimate.distinct == pytest.approx(len(np.unique(items)), rel=0.1)
    assert estimate.once == pytest.approx(exact.once, abs=0.03)


def test_hashes_tell_rows_apart_by_value_and_place() -> None:
    rows = np.array([[0, 1], [1, 0], [-1, 0], [0, -1], [0, 1]], np.int32)
    found = hash_rows(rows)
    assert len(set(found[:4].tolist())) == 4
    assert found[0] == found[4]
    spread = hash_rows(np.arange(10_000, dtype=np.int32)[:, None])
    assert len(np.unique(spread)) == 10_000
    assert float(spread.mean()) / 2**64 == pytest.approx(0.5, abs=0.02)
