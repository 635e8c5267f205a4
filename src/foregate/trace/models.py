"""What a tracing session drives: Foregate's engine, or a plain resident transformers model, behind one interface.

Neither the engine nor its sampler is imported here (they lie above): the caller hands them in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from foregate.config import SamplingConfig

Encode = Callable[[str], list[int]]
Choose = Callable[[Tensor], int]
"""Logits [V] → token id."""


class TracedModel(Protocol):
    """A model that routes prompts. ``tracked`` is what RouterTracker attaches to; ``context`` the most tokens."""

    tracked: Any
    context: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt. Raises PromptError where it is empty or leaves no room for one more token."""
        ...

    def encode_more(self, text: str) -> list[int]:
        """Token ids of a text that goes on after a prompt."""
        ...

    def generate(self, ids: list[int], sampling: SamplingConfig) -> None:
        """Route ``ids`` and what the model says next."""
        ...

    def force(self, ids: list[int]) -> None:
        """Route ``ids`` in one pass."""
        ...


class EngineModel:
    """Foregate's engine (``foregate.engine.engine.Engine``)."""

    def __init__(self, engine: Any, encode: Encode) -> None:
        self.tracked = engine
        self.context: int = engine.context
        self.encode = encode

    def encode_more(self, text: str) -> list[int]:
        return _bare(self.tracked.tokenizer, text)

    def generate(self, ids: list[int], sampling: SamplingConfig) -> None:
        for _ in self.tracked.stream(ids, sampling):
            pass

    def force(self, ids: list[int]) -> None:
        self.tracked.logits(ids)


class ResidentModel:
    """A transformers model with all its weights in memory. ``sampler`` makes the choice of tokens of one prompt."""

    def __init__(
        self, model: Any, tokenizer: Any, encode: Encode, context: int, sampler: Callable[[SamplingConfig], Choose]
    ) -> None:
        self.tracked = model
        self.context = context
        self.encode = encode
        self._tokenizer = tokenizer
        self._sampler = sampler
        self._last_only = {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}

    def encode_more(self, text: str) -> list[int]:
        return _bare(self._tokenizer, text)

    @torch.inference_mode()
    def generate(self, ids: list[int], sampling: SamplingConfig) -> None:
        choose, ends = self._sampler(sampling), self._ends()
        past, step = None, ids
        for _ in range(min(sampling.max_new_tokens, self.context - len(ids))):
            out = self._call(step, past)
            past = out.past_key_values
            step = [choose(out.logits[0, -1])]
            if step[0] in ends:
                return

    @torch.inference_mode()
    def force(self, ids: list[int]) -> None:
        self._call(ids, None)

    def _call(self, ids: list[int], past: Any) -> Any:
        given = torch.tensor([ids], device=self.tracked.device)
        return self.tracked(input_ids=given, past_key_values=past, use_cache=True, **self._last_only)

    def _ends(self) -> set[int]:
        configs = (self.tracked.generation_config, self.tracked.config)
        given: Any = next((c.eos_token_id for c in configs if getattr(c, "eos_token_id", None) is not None), [])
        return set(given) if isinstance(given, (list, tuple)) else {int(given)}


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(type(model).forward).parameters


def _bare(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
