"""Studies: the speed-up law beside simulated time, sentences that follow from numbers, cosines of guessed inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from foregate.errors import TraceError
from foregate.evaluation import published
from foregate.evaluation.judge import Bench
from foregate.evaluation.law import law_rows, speed_up
from foregate.evaluation.settings import Settings
from foregate.evaluation.signal_quality import PlainSignal, cosines
from foregate.evaluation.studies import Studies, _flaw
from foregate.trace.sample import SAMPLE


def test_a_law_that_is_not_the_published_one() -> None:
    assert speed_up(0.6, 0.784) == pytest.approx(1.888, abs=1e-3)
    assert speed_up(0.5, 1.0) == 2.0
    assert speed_up(0.5, 0.0) == 1.0


def test_a_simulation_beyond_the_physical_ceiling() -> None:
    bench = Bench(Settings((SAMPLE,), residencies=(0.25,), policies=("lru",), tokens=60, sim_tokens=40))
    rows = law_rows(bench, ("previous-token", "oracle"), policy="lru", share=0.25)
    assert {row.predictor for row in rows} == {"previous-token", "oracle"}
    for row in rows:
        # Staging takes slots, so a little more is read than the cache alone would need: allow for that.
        assert 0.5 < row.simulated <= row.ceiling * 1.02
        assert row.law == pytest.approx(speed_up(row.stall_share, row.recall))
    slow = next(row for row in rows if row.predictor == "oracle" and row.bandwidth == 1.0)
    assert slow.recall == 1.0
    assert slow.law > slow.ceiling, "the law's flaw: it promises what no overlap can give"
    assert "more than the ceiling" in _flaw(rows)


def test_a_sentence_that_contradicts_its_numbers() -> None:
    assert published.compared(0.9, 80.0, "x") == "Ours is 10.0 points above the published 80 %; what differs: x."
    assert "below the published 80 %" in published.compared(0.5, 80.0, "x")
    assert "within a point" in published.compared(0.803, 80.0, "x")


def test_studies_without_a_leaderboard(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="run make leaderboard first"):
        Studies(tmp_path, tmp_path / "out", tmp_path / "docs", 10)


def test_a_cosine_of_the_wrong_layer() -> None:
    """The true router input through no norm at all is itself: cosine 1 in every layer but the first."""
    bench = Bench(Settings((SAMPLE,), residencies=(0.25,), policies=("lru",), tokens=20))
    rng = np.random.default_rng(0)
    for prompt in bench.prompts:
        states = rng.normal(size=(prompt.tokens, bench.shape.layers, 8)).astype(np.float32)
        prompt.hidden["router_input"] = states
        prompt.hidden["residual"] = np.roll(states, -1, axis=1)  # layer l holds what layer l + 1 is fed

    class NoNorm:
        def normed(self, target: int, residual: object) -> object:
            return residual

    bench.routers = NoNorm()
    found = cosines(bench, PlainSignal(), 20)
    assert found[0] is None
    assert found[1:] == pytest.approx([1.0] * (bench.shape.layers - 1), abs=1e-5)
