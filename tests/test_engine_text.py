"""Text comes out whole: characters that span tokens, special tokens, and what the tokenizer does between words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from foregate.engine.text import Detokenizer, encode
from foregate.errors import ConfigError, PromptError

Tiny = Callable[[str], Path]


@pytest.mark.parametrize(
    "text", ["plain words", "naïve café", "日本語のテキスト", "🙂🙃 emoji", "a\n\tb  c", "naïve 🙂 日本 " * 20]
)
def test_streamed_text_is_the_decoded_text(text: str, tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("qwen2_moe"))
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in tokenizer(text, add_special_tokens=False).input_ids]
    assert "".join(pieces) + detokenizer.flush() == text
    assert not any("�" in piece for piece in pieces)


def test_broken_bytes_are_held_back_only_so_long(tiny: Tiny) -> None:
    detokenizer = Detokenizer(AutoTokenizer.from_pretrained(tiny("qwen2_moe")))
    broken = 0xE3  # first byte of a three-byte character that never continues
    assert detokenizer.add(broken) == ""
    assert "�" in detokenizer.flush()


def test_prompts_that_cannot_run(tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("qwen2_moe"))
    with pytest.raises(PromptError, match="empty"):
        encode(tokenizer, "\n ", template="auto", context=100)
    with pytest.raises(PromptError, match=r"500 tokens; the model's context of 100"):
        encode(tokenizer, "7" * 500, template="off", context=100)
    with pytest.raises(ConfigError, match="maybe"):
        encode(tokenizer, "a", template="maybe", context=100)
