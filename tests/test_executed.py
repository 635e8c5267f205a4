"""Executing the guessed experts: what it costs, by hand and on the reference model; what is kept, and not mixed up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from foregate.checkpoint.locate import locate
from foregate.datasets.prompt import Prompt
from foregate.errors import PredictorError, TraceError
from foregate.evaluation import executed
from foregate.evaluation.executed import EXACT, Executed, held_texts
from foregate.evaluation.executed_table import PREDICTED, counts, executed_section, number, overall
from foregate.evaluation.held_out import HeldOut
from foregate.trace.sample import SAMPLE

PROBLEM = Prompt("gsm8k/1", "mathematics", "Question: Tom has 3 apples and buys 2. How many has he?\nAnswer:", "#### 5")


def line(domain: str, tokens: int, delta: float, accuracy: float, error: float | None = 0.001) -> dict[str, Any]:
    return {
        "domain": domain, "tokens": tokens, "delta": delta, "delta_error": error, "accuracy": accuracy,
        "accuracy_against": 0.5, "accuracy_error": error, "agreement": 0.9,
    }  # fmt: skip


def facts(*lines: dict[str, Any]) -> dict[str, Any]:
    return {"domains": list(lines), "deviation": {"set_agreement": 0.4, "router_mass_not_run": 0.1}}


class Fixed(Executed):
    """With losses and solutions that are known."""

    def __init__(self, costs: dict[str, float], error: float | None) -> None:
        super().__init__("reference", "", Path(), Path())
        self.__dict__.update(costs=costs, error=error)

    def loss(self, predictor: str, texts: object, tokens: int) -> dict[str, Any]:
        cost = self.__dict__["costs"].get(predictor, 0.02)
        return facts(line("prose", 300, cost, 0.45, self.__dict__["error"]))

    def solutions(self, predictor: str, problems: object) -> list[str | None]:
        return ["so 5\n#### 5"] if predictor in (EXACT, "hybrid") else [None]


def test_domains_of_unequal_length() -> None:
    found = overall(facts(line("a", 100, 0.01, 0.4), line("b", 300, 0.03, 0.5)))
    assert found.delta == pytest.approx(0.025)
    assert (found.exact, found.kept) == (pytest.approx(0.5), pytest.approx(0.475 / 0.5))
    assert found.delta_error == pytest.approx((0.25**2 + 0.75**2) ** 0.5 * 0.001)
    assert found.kept_error == pytest.approx(found.delta_error / 0.5)
    assert overall(facts(line("a", 100, 0.01, 0.4, None))).delta_error is None
    assert overall(facts({**line("a", 100, 0.01, 0.0), "accuracy_against": 0.0})).kept is None


@pytest.mark.parametrize(
    ("costs", "error", "said"),
    [
        ({"hybrid": 0.01}, 0.001, "holds here by loss (+10.0 ± 1.0 and +20.0 ± 1.0)"),
        ({"quasi-hidden": 0.01}, 0.001, "does not hold here by loss (+20.0 ± 1.0 and +10.0 ± 1.0)"),
        ({"hybrid": 0.0195}, 0.001, "holds here by loss (+19.5 ± 1.0 and +20.0 ± 1.0, within the errors)"),
        ({}, None, "does not hold here by loss (+20.0 and +20.0, of unknown errors)"),
    ],
)
def test_a_claim_that_contradicts_its_table(costs: dict[str, float], error: float | None, said: str) -> None:
    table, sentence = executed_section(Fixed(costs, error), (), [PROBLEM], 100)
    rows = [row.strip("| ").split(" | ") for row in table.strip().split("\n")]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert [row[0] for row in rows[2:]] == [EXACT, *PREDICTED]
    named = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert [named["hybrid"][name] for name in ("same solution", "in format", "right")] == ["1", "1", "1"]
    assert [named["fusion"][name] for name in ("same solution", "in format", "right")] == ["0", "0", "0"]
    assert named["hybrid"]["reported: score kept"] == "93.8"
    assert named["estimator"]["own set"] == "40.0"
    assert said in sentence


def test_solutions_that_are_told_from_the_text_around() -> None:
    assert number("so <<6*2=12>>12 eggs\n#### 12") == 12
    assert number("#### $1,234.50 a year") == 1234.5
    assert [number(text) for text in ("#### -3", "#### -$3", "#### $-3")] == [-3, -3, -3]
    assert number("the answer is 12") is None
    assert counts(["#### 5", "#### 6", "six", None], ["#### 5", "x", "six", None], ["#### 5"] * 4) == ["2", "2", "1"]


def test_texts_that_are_those_of_the_trace() -> None:
    held = HeldOut((SAMPLE,), 60)
    prompt = held.load()[0]
    ((domain, text),) = held_texts(held.model.name, [prompt])
    assert domain == prompt.domain
    ids = [*prompt.prefill_ids.tolist(), *prompt.token_id.tolist()]
    assert text == AutoTokenizer.from_pretrained(locate(held.model.name)).decode(ids)
    assert len(ids) > len(prompt.prefill_ids) > 0


def test_a_guess_that_is_right_and_one_that_is_not(tmp_path: Path) -> None:
    texts = held_texts("reference", HeldOut((SAMPLE,), 60).load()[:1])
    study = Executed("reference", "", tmp_path, tmp_path / "out")
    good, bad = (study.loss(name, texts, 60) for name in ("next-gate", "previous-token"))
    assert good["deviation"]["predicted_share"] > 0.9
    assert overall(bad).delta > overall(good).delta
    assert overall(bad).agreement < overall(good).agreement


def test_what_is_kept_for_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def judge(config: object, texts: object, *, tokens: int, length: int) -> Any:
        measured.append(tokens)
        return type("Found", (), {"as_dict": lambda self: {"deviation": {"predicted_share": 0.9}, "tokens": tokens}})()

    monkeypatch.setattr(executed, "lossy_quality", judge)
    study, texts = Executed("reference", "", tmp_path, tmp_path / "out"), [("a", "one")]
    assert [study.loss("next-gate", texts, count)["tokens"] for count in (5, 5, 6)] == [5, 5, 6]
    assert measured == [5, 6]
    study.loss("next-gate", [("a", "two")], 6)
    study.loss("stale-gate", texts, 6)
    assert measured == [5, 6, 6, 6]
    (tmp_path / "next-gate.safetensors").write_bytes(b"trained")
    study.loss("next-gate", texts, 6)
    assert len(measured) == 5
    replace(study, fingerprint="trained on").loss("next-gate", texts, 6)
    assert len(measured) == 6


def test_a_predictor_that_predicted_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = type("Found", (), {"as_dict": lambda self: {"deviation": {"predicted_share": 0.0}}})
    monkeypatch.setattr(executed, "lossy_quality", lambda *_, **__: nothing())
    with pytest.raises(PredictorError, match="'next-gate' predicted 0% of the layers"):
        Executed("reference", "", tmp_path, tmp_path / "out").loss("next-gate", [], 1)
    assert not list((tmp_path / "out").glob("*.json"))


def test_a_zoo_without_what_needs_training(tmp_path: Path) -> None:
    study = Executed("reference", "", tmp_path, tmp_path / "out")
    study.expect(["next-gate", "previous-token"])
    with pytest.raises(TraceError, match=r"hybrid\.safetensors: file is missing; run make leaderboard first"):
        study.expect(["next-gate", "hybrid"])


def test_solutions_with_and_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Executed("reference", "", tmp_path, tmp_path / "out")
    (whole,) = study.solutions(EXACT, [PROBLEM])
    assert whole is not None
    assert number(whole) is not None
    monkeypatch.setattr(executed, "ANSWER_TOKENS", 3)
    assert study.solutions(EXACT, [PROBLEM]) == [None]
    kept = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("solutions-*.json")]
    assert len(kept) == 2
