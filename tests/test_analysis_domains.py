"""A planted difference of domains is found, a null one is not, and the false positive rate is the one promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foregate.analysis.domains import Domains
from foregate.analysis.permutation import cohens_d, compare, jensen_shannon, smallest_p
from foregate.analysis.prompt import Prompt, Shape
from foregate.analysis.settings import Settings
from foregate.analysis.study import analyse
from test_analysis_known import by_name, rows
from test_analysis_traces import Independent, Planted, write_trace


def test_a_planted_difference_is_found_where_it_was_planted(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", Planted(), prompts=40, domains=("a", "b"))
    study = analyse([path], Settings(permutations=500, replay_events=500))
    layers = rows(study, "domains", "domain_layers")
    assert [row["significant"] for row in layers] == [False, False, False, True]
    experts = [row for row in rows(study, "domains", "domain_experts") if row["p_corrected"] < 0.05]
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
    """300 null experiments of 4 layers: any layer, and any expert, significant in about 5 % of them."""
    layers = experts = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        shares = rng.dirichlet(np.full(8, 2.0), size=(20, 4))
        found = compare(shares[:9], shares[9:], 99, rng)
        layers += found.layer_p.min() < 0.05
        experts += found.expert_p.min() < 0.05
    assert 4 <= layers <= 25  # binomial(300, 0.05): 15 expected, 25 at the 99.5th percentile
    assert 4 <= experts <= 25


def small_prompt(rng: np.random.Generator, number: int, domain: str, *, planted: bool = False) -> Prompt:
    """40 tokens, 3 layers of 6 experts, top-1; every prompt has its own taste. ``planted``: layer 1 likes expert 0."""
    taste = rng.dirichlet(np.full(6, 3.0), size=3)
    if planted:
        taste[1] = (taste[1] + np.eye(6)[0]) / 2
    experts = np.stack([rng.choice(6, 40, p=one) for one in taste], axis=1)[:, :, None].astype(np.int32)
    return Prompt(number, domain, False, False, True, experts, np.zeros(40, bool), np.zeros(40, np.int32))


def four_domains(seed: int, *, planted: str = "") -> list[dict[str, Any]]:
    """Rows of the layers of four domains of 8 prompts; 6 pairs x 3 layers."""
    rng = np.random.default_rng(seed)
    found = Domains(Shape((6,) * 3, (1,) * 3), Settings(permutations=199, seed=seed))
    for number in range(32):
        domain = "abcd"[number % 4]
        found.add(small_prompt(rng, number, domain, planted=domain == planted))
    tables = {one.name: one.whole().to_pylist() for one in found.finish().tables}
    return list(tables["domain_layers"])


def test_false_positives_stay_at_the_level_over_all_pairs_of_domains() -> None:
    """120 null studies of 6 pairs x 3 layers: the correction is over all of them together."""
    false = sum(any(row["significant"] for row in four_domains(seed)) for seed in range(120))
    assert false <= 13  # binomial(120, 0.05): 6 expected at most, 13 at the 99.7th percentile


def test_many_pairs_of_domains_do_not_hide_a_large_difference() -> None:
    """The bug it guards: with Holm over pairs x layers no p of 2,000 permutations could be below 5 %."""
    rows = four_domains(0, planted="c")
    assert {(row["layer"]) for row in rows if row["significant"]} == {1}
    assert {row["first"] + row["second"] for row in rows if row["significant"]} == {"ac", "bc", "cd"}


def test_a_comparison_that_could_show_nothing_says_so(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", Planted(), prompts=6, domains=("a", "b"))
    section = by_name(analyse([path], Settings(permutations=500, replay_events=500)), "domains")
    assert section.notes == [
        "a and b: with 3 and 3 prompts, 500 permutations and 2 domains p cannot fall below 0.1: no difference "
        "could be shown."
    ]
    assert smallest_p(50, 50, 99) == 0.01


def test_distances_by_hand() -> None:
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
