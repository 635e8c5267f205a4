"""Prompt → token ids, and token ids → text as they come."""

from __future__ import annotations

from typing import Any

from foregate.errors import ConfigError, PromptError

_UNFINISHED = "�"
_CONTEXT = 8
"""Tokens decoded together with the new one, because a tokenizer's spacing depends on what stands before."""


def encode(tokenizer: Any, prompt: str, *, template: str, context: int) -> list[int]:
    """Ids of ``prompt``, through the chat template if ``template`` is auto and there is one.

    Raises PromptError for an empty prompt and for one that leaves no room in ``context`` tokens.
    """
    if template not in ("auto", "off"):
        raise ConfigError(f"chat template {template!r} is not auto or off")
    if not prompt.strip():
        raise PromptError("the prompt is empty")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise PromptError("the prompt is not valid UTF-8")
    if template == "auto" and getattr(tokenizer, "chat_template", None):
        ids = _chat(tokenizer, prompt)
    else:
        ids = list(tokenizer(prompt)["input_ids"])
    check_length(ids, context)
    return ids


def _chat(tokenizer: Any, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    except Exception as error:  # a template is a program that came with the model
        raise PromptError(f"the model's chat template fails ({error}); run without it: --chat-template off") from error
    return list(encoded["input_ids"])


def check_length(ids: list[int], context: int) -> None:
    """Raises PromptError for no tokens, or too many to generate even one more."""
    if not ids:
        raise PromptError("the prompt has no tokens")
    if len(ids) >= context:
        raise PromptError(f"the prompt has {len(ids):,} tokens; the model's context of {context:,} leaves no room")


class Detokenizer:
    """Text that each new token adds. Characters that span tokens come out with their last token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0

    def add(self, token_id: int) -> str:
        """Text that became final with ``token_id``; empty inside a character."""
        self._ids.append(token_id)
        if self._decode(self._ids[-_CONTEXT:]).endswith(_UNFINISHED) and len(self._ids) - self._given < _CONTEXT:
            return ""
        return self.flush()

    def flush(self) -> str:
        """Whatever is still held back: the bytes of a character that never ended."""
        start = max(0, self._given - _CONTEXT)
        known = self._decode(self._ids[start : self._given])
        text = self._decode(self._ids[start:])
        self._given = len(self._ids)
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
