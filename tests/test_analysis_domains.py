"""A planted difference of domains is found, a null one is not, and the false positive rate is the one promised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from foregate.analysis.permutation import cohens_d, compare, holm, jensen_shannon
from foregate.analysis.settings import Settings
from foregate.analysis.study import analyse
from test_analysis_known import by_name, rows
from test_analysis_traces import Independent, Planted, write_trace


def test_a_planted_difference_is_found_where_it_was_planted(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", Planted(), prompts=40, domains=("a", "b"))
    study = analyse([path], Settings(permutations=500, replay_events=500))
    layers = rows(study, "domains", "domain_layers")
    assert [row["significant"] for row in layers] == [False, False, False, True]
    experts = [row for row in rows(study, "domains", "domain_experts") if row["p_max"] < 0.05]
    assert {(row["layer"], row["expert"]) for row in experts} == {(3, 0), (3, 1)}
    assert all(row["cohens_d"] < -2 for row in experts)
    assert "a and b differ: 1 of 4 layers" in by_name(study, "domains").findings[0]


def test_no_difference_is_found_where_there_is_none(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", Independent(), prompts=40, domains=("a", "b"), seed=3)
    section = by_name(analyse([path], Settings(permutations=500, replay_events=500)), "domains")
    assert section.summary["pairs"][0]["significant_layers"] == 0
    assert section.summary["pairs"][0]["significant_experts"] == 0
    assert "are not shown to differ" in section.findings[0]


def test_false_positives_stay_at_the_level_over_many_seeds() -> None:
    """300 null experiments of 4 layers: any layer (Holm), and any expert, significant in about 5 % of them."""
    layers = experts = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        shares = rng.dirichlet(np.full(8, 2.0), size=(20, 4))
        found = compare(shares[:9], shares[9:], 99, rng)
        layers += min(holm(list(found.p))) < 0.05
        experts += found.expert_p.min() < 0.05
    assert layers <= 25  # binomial(300, 0.05): 15 expected, 25 at the 99.5th percentile
    assert 4 <= experts <= 25


def test_corrections_and_distances_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == 1
    assert jensen_shannon(np.array([0.5, 0.5]), np.array([0.5, 0.5])) == 0
    first, second = np.array([1.0, 2, 3]), np.array([3.0, 4, 5])
    assert cohens_d(first, second) == pytest.approx(-2)


def test_the_same_seed_gives_the_same_answer(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", Planted(), prompts=20, domains=("a", "b"))
    first, second = (
        rows(analyse([path], Settings(permutations=50, replay_events=500)), "domains", "domain_layers")
        for _ in range(2)
    )
    assert first == second
