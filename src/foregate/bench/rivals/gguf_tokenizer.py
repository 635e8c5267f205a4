"""The tokenizer in a GGUF file: a byte-level BPE whose splitting of words llama.cpp knows under a name of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from foregate.checkpoint.jsonfile import parse
from foregate.errors import CheckpointError, UnsupportedModelError

BYTES, DIGITS = "ByteLevel", "Digits"

SPLITS = {(BYTES,): "gpt-2", (DIGITS, BYTES): "starcoder"}
"""Pre-tokenizers, in their order → what llama.cpp calls that. Digits are split one by one, bytes by GPT-2's pattern."""

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's own pattern, which llama.cpp calls ``qwen2``. Not tested: no such tokenizer ships with anything here."""


def write_tokenizer(writer: GGUFWriter, model_dir: Path, raw: dict[str, Any], *, known: bool) -> None:
    """The tokenizer of ``model_dir``, or only the number of tokens if not ``known``.

    Raises UnsupportedModelError for any but a byte-level BPE with a known split, CheckpointError for a missing file.
    """
    size = raw["vocab_size"]
    writer.add_vocab_size(size)
    if not known:
        writer.add_tokenizer_model("no_vocab")
        return
    path = model_dir / "tokenizer.json"
    content = _read(path)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(path, content))
    _write_tokens(writer, path, content, size)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]])
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        value = raw.get(f"{name}_token_id")
        if isinstance(value, int):
            add(value)
    writer.add_add_bos_token(False)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse(path.read_bytes())
        kind = content["model"]["type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a tokenizer ({error!r})") from None
    if kind != "BPE":
        raise _refused(path, f"a model of type {kind!r}")
    return dict(content)


def _split(path: Path, content: dict[str, Any]) -> str:
    stages = content.get("pre_tokenizer") or {}
    stages = stages.get("pretokenizers", [stages])
    kinds = tuple(stage.get("type") for stage in stages)
    if (
        kinds == ("Split", BYTES)
        and stages[0].get("pattern") == {"Regex": QWEN}
        and not stages[1].get("use_regex", True)
    ):
        return "qwen2"
    plain = kinds in SPLITS and stages[-1].get("use_regex", True) and not stages[-1].get("add_prefix_space")
    if not plain or (kinds[0] == DIGITS and not stages[0].get("individual_digits")):
        raise _refused(path, f"pre-tokenizers {kinds} with these settings")
    if content.get("normalizer"):
        raise _refused(path, f"a normalizer ({content['normalizer'].get('type')})")
    return SPLITS[kinds]


def _refused(path: Path, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{path}: {what}, which has no known name in a GGUF file; export without tokenizer")


def _write_tokens(writer: GGUFWriter, path: Path, content: dict[str, Any], size: int) -> None:
    """One string for every row of the embedding; rows that no token has are ``[PADn]``, unused."""
    names = [f"[PAD{index}]" for index in range(size)]
    types = [int(TokenType.UNUSED)] * size
    special = {entry["id"]: entry for entry in content.get("added_tokens", [])}
    try:
        for name, index in content["model"]["vocab"].items():
            names[index], types[index] = name, int(TokenType.NORMAL)
        for index, entry in special.items():
            kind = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
            names[index], types[index] = entry["content"], int(kind)
    except IndexError:
        raise CheckpointError(f"{path}: has more tokens than the {size} rows of the embedding") from None
    writer.add_token_list(names)
    writer.add_token_types(types)
