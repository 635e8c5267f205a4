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
        """The last tokens: what a tokenizer takes for a token is much the same for one and for twenty."""
        self._known = ""
        """Their text, as far as it was told."""
        self._held = 0

    def add(self, token_id: int) -> str:
        """Text that became final with ``token_id``; empty inside a character."""
        self._ids.append(token_id)
        self._held += 1
        text = self._decode()
        return "" if text.endswith(_UNFINISHED) and self._held < _CONTEXT else self._tell(text)

    def flush(self) -> str:
        """Whatever is still held back: the bytes of a character that never ended."""
        return self._tell(self._decode()) if self._held else ""

    def _tell(self, text: str) -> str:
        added, self._known, self._held = text[len(self._known) :], text, 0
        if len(self._ids) > 2 * _CONTEXT:
            self._ids = self._ids[-_CONTEXT:]
            self._known = self._decode()
        return added

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
