"""Prompts out of a user's own file: ShareGPT JSON, JSONL, or plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from foregate.datasets.prompt import Dataset, DatasetError, Prompt, make_dataset
from foregate.datasets.rows import Row, json_rows, jsonl_rows, read_text

PROMPT_KEYS = ("prompt", "question", "instruction", "input")
REFERENCE_KEYS = ("reference", "completion", "answer", "response", "output", "canonical_solution")
ID_KEYS = ("id", "task_id")
USER, ASSISTANT = ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard")

PASSAGE = 1200
"""Characters of a passage at most; a paragraph is cut only if it is longer."""

OPENING = 0.25
"""Share of a passage that is the prompt; the rest is its reference."""


def open_file(path: Path, domain: str | None) -> Dataset:
    """A data set from one file, by its suffix. Prompts get ``domain``, else that of their row, else the file's name."""
    suffixes = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    name = path.name.split(".")[0]
    if suffixes.startswith((".jsonl", ".ndjson")):
        rows: Iterable[Row] = jsonl_rows(path)
    elif suffixes.startswith(".json"):
        rows = json_rows(path)
    else:
        pieces = passages(read_text(path))
        prompts = [opened(f"{name}/{number:05d}", domain or name, piece) for number, piece in enumerate(pieces)]
        return make_dataset("text", prompts, path.name)
    return make_dataset("file", prompts_of(rows, name, domain, str(path)), path.name)


def prompts_of(rows: Iterable[Row], name: str, domain: str | None, where: str) -> list[Prompt]:
    """A prompt for every row: a conversation, a prompt with its answer, or a text. Raises DatasetError."""
    found = []
    for number, row in enumerate(rows):
        given = next((str(row[key]) for key in ID_KEYS if row.get(key) not in (None, "")), f"{number:05d}")
        prompt = _prompt(row, f"{name}/{given}", domain or str(row.get("domain") or name), f"{where}: row {number + 1}")
        if prompt is not None:
            found.append(prompt)
    return found


def sharegpt(rows: Iterable[Row], where: str) -> list[Prompt]:
    """The first question of every conversation, and its answer; conversations without a question are left out."""
    return [
        prompt
        for number, row in enumerate(rows)
        if (prompt := _conversation(row, f"sharegpt/{number:06d}", "chat", f"{where}: row {number + 1}"))
    ]


def passages(text: str, most: int = PASSAGE) -> list[str]:
    """``text`` in pieces of whole paragraphs, up to ``most`` characters each."""
    pieces: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        for start in range(0, len(paragraph), most):
            block = paragraph[start : start + most]
            if pieces and len(pieces[-1]) + len(block) + 2 <= most:
                pieces[-1] += "\n\n" + block
            else:
                pieces.append(block)
    return [piece for piece in pieces if piece.strip()]


def opened(name: str, domain: str, passage: str) -> Prompt:
    """A passage as a prompt, its opening words, and a reference, the rest."""
    cut = re.compile(r"\s").search(passage, int(len(passage) * OPENING) or 1)
    at = cut.start() if cut else len(passage)
    return Prompt(name, domain, passage[:at], passage[at:])


def _prompt(row: Row, name: str, domain: str, where: str) -> Prompt | None:
    if "conversations" in row or "messages" in row:
        return _conversation(row, name, domain, where)
    text = next((row[key] for key in PROMPT_KEYS if isinstance(row.get(key), str)), None)
    if text is not None:
        reference = next((row[key] for key in REFERENCE_KEYS if isinstance(row.get(key), str)), "")
        return Prompt(name, domain, text, reference)
    passage = next((row[key] for key in ("text", "content") if isinstance(row.get(key), str)), None)
    if passage is None:
        keys = ", ".join((*PROMPT_KEYS, "text", "content", "conversations", "messages"))
        raise DatasetError(f"{where}: none of {keys}; it has {', '.join(sorted(row)) or 'nothing'}")
    return opened(name, domain, passage) if passage.strip() else None


def _conversation(row: Row, name: str, domain: str, where: str) -> Prompt | None:
    turns = [_turn(turn, where) for turn in row.get("conversations") or row.get("messages") or ()]
    asked = next((number for number, (who, text) in enumerate(turns) if who in USER and text.strip()), None)
    if asked is None:
        return None
    answer = turns[asked + 1][1] if len(turns) > asked + 1 and turns[asked + 1][0] in ASSISTANT else ""
    return Prompt(name, domain, turns[asked][1], answer)


def _turn(turn: Any, where: str) -> tuple[str, str]:
    """Speaker and text, as ShareGPT (from, value) or OpenAI (role, content) has them."""
    if isinstance(turn, dict):
        who, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if isinstance(who, str) and isinstance(text, str):
            return who, text
    raise DatasetError(f"{where}: a turn without from and value (or role and content)")
