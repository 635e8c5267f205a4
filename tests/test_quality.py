"""``foregate quality``: losses against transformers' own, differences against the same counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from foregate.checkpoint.pack import pack
from foregate.checkpoint.precision import Precision
from foregate.checkpoint.quantise import parse_scheme
from foregate.cli.quality import quality
from foregate.engine.quality import Score, Text, choose_texts, compare, score_of
from foregate.errors import ConfigError
from test_checkpoint_support import tiny

TEXTS = ("The first text of this file is here.", "Another one, a little longer than the first.", "And 3.")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny(tmp_path / "model", "qwen3_moe")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [{"prompt": text, "domain": ("one", "one", "two")[number]} for number, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judge(
    capsys: pytest.CaptureFixture[str], model: Path, data: Path, **options: object
) -> dict[str, dict[str, float]]:
    given = {"against": None, "data_dir": None, "split": None, "tokens": 4000, "length": 256, **options}
    quality(str(model), [str(data)], memory_budget="50%", threads=None, as_json=True, **given)  # type: ignore[arg-type]
    said = json.loads(capsys.readouterr().out)
    return {line["domain"]: line for line in said["domains"]}


def test_loss_is_transformers_own(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = judge(capsys, model, data)
    stock = AutoModelForCausalLM.from_pretrained(model, experts_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    total, tokens = 0.0, 0
    for text in TEXTS[:2]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(stock(ids).logits[0, :-1].float(), ids[0, 1:])
        total, tokens = total + loss.item() * (ids.shape[1] - 1), tokens + ids.shape[1] - 1
    assert (found["one"]["texts"], found["one"]["tokens"]) == (2, tokens)
    assert found["one"]["loss"] == pytest.approx(total / tokens, abs=0.02)
    assert found["one"]["delta"] is None


def test_a_pack_is_compared_with_its_original(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(model, model.parent / "plain")
    pack(model, model.parent / "int4", precision=Precision(experts=parse_scheme("int4")))
    same = judge(capsys, model.parent / "plain", data, against=str(model))
    assert all((line["delta"], line["agreement"]) == (0, 1) for line in same.values())
    other = judge(capsys, model.parent / "int4", data, against=str(model))
    assert all(line["delta"] == pytest.approx(line["loss"] - line["against"]) != 0 for line in other.values())
    assert other["one"]["agreement"] < 1
    assert other["two"]["delta_error"] is None


def test_a_choice_that_is_the_text_and_one_that_is_not() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    found = score_of(Text("a", (2, 0, 1, 0, 1)), logits, 2)
    assert (found.choices, found.right) == ((1, 0, 2), 2)
    assert found.losses == pytest.approx((-logits.log_softmax(dim=-1)[torch.arange(3), [1, 0, 1]]).tolist())


def test_differences_by_hand() -> None:
    ours = [Score("a", (1.0, 2.0), (5, 6), 1), Score("a", (4.0,), (7,), 0), Score("b", (1.5,), (1,), 1)]
    theirs = [Score("a", (1.5, 1.0), (5, 9), 2), Score("a", (3.0,), (7,), 0), Score("b", (1.5,), (1,), 1)]
    a, b = compare(ours, theirs)
    assert (a.domain, a.tokens, a.texts, a.agreement) == ("a", 3, 2, pytest.approx(2 / 3))
    assert (a.loss, a.against, a.delta) == (pytest.approx(7 / 3), pytest.approx(5.5 / 3), pytest.approx(0.5))
    assert (a.accuracy, a.accuracy_against) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    # residuals of 1/3 and -1/3 right tokens, in 3 tokens
    assert a.accuracy_error == pytest.approx(2**0.5 / 3 * 2**0.5 / 3)
    # residuals -0.5 and 0.5 of two texts of 1.5 tokens on average
    assert a.delta_error == pytest.approx((0.5**0.5) / 1.5 / 2**0.5)
    assert (b.delta, b.agreement, b.delta_error) == (0, 1, None)


def test_texts_end_where_a_domain_has_enough() -> None:
    texts = choose_texts(
        [("a", "x" * 50), ("b", "x" * 3), ("a", "x" * 50), ("a", "x" * 50)], list, tokens=60, length=40
    )
    assert [(text.domain, len(text.ids) - 1) for text in texts] == [("a", 39), ("b", 2), ("a", 21)]


def test_models_that_read_other_tokens_do_not_compare(model: Path, data: Path, tmp_path: Path) -> None:
    other = tiny(tmp_path / "other", "olmoe")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"], tokenizer["normalizer"] = tokenizer["pre_tokenizer"], {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="reads the texts as other tokens"):
        quality(str(other), [str(data)], str(model), None, None, 4000, 256, "50%", None, as_json=True)
