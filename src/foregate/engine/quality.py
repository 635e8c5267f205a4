"""How well a model predicts given texts, and how far another form of it departs from that. Under the engine.

Shapes: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from foregate.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids [T] of a text of one domain; the first is given, the other T - 1 are predicted."""

    domain: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Of one text: loss in nats of every predicted token, and what the model would have chosen instead of it.

    ``right``: how many of its choices are the text's own token.
    """

    domain: str
    losses: tuple[float, ...]
    choices: tuple[int, ...]
    right: int


@dataclass(frozen=True, slots=True)
class DomainQuality:
    """``loss`` in nats per token, ``accuracy`` the share of tokens for which the greedy choice is the text's own.

    The other fields compare with another model and are None where there is none: ``delta`` = loss - its loss,
    ``delta_error`` the standard error of that over texts (None for a single text), ``accuracy_against`` its accuracy,
    ``accuracy_error`` the standard error of accuracy - its accuracy, over texts too, ``agreement`` the share of tokens
    for which both would choose the same.
    """

    domain: str
    texts: int
    tokens: int
    loss: float
    accuracy: float
    against: float | None = None
    delta: float | None = None
    delta_error: float | None = None
    accuracy_against: float | None = None
    accuracy_error: float | None = None
    agreement: float | None = None


def choose_texts(
    prompts: Iterable[tuple[str, str]], encode: Callable[[str], Sequence[int]], *, tokens: int, length: int
) -> list[Text]:
    """The first of ``prompts`` (domain, text) until every domain has ``tokens`` to predict, each cut at ``length``."""
    found: list[Text] = []
    have: dict[str, int] = {}
    for domain, text in prompts:
        room = tokens - have.get(domain, 0)
        ids = tuple(encode(text)[: min(length, room + 1)]) if room > 0 else ()
        if len(ids) > 1:
            have[domain] = have.get(domain, 0) + len(ids) - 1
            found.append(Text(domain, ids))
    return found


def score(engine: Engine, text: Text) -> Score:
    """One pass over ``text``. Raises PromptError where the model does not take it."""
    return score_of(text, engine.logits(list(text.ids))[:-1], 1)


def score_of(text: Text, logits: Tensor, given: int) -> Score:
    """``logits`` [T - given, V] predict the tokens of ``text`` after the first ``given``."""
    logits = logits.float()
    wanted = logits.new_tensor(text.ids[given:]).long()
    losses = F.cross_entropy(logits, wanted, reduction="none")
    choices = logits.argmax(dim=-1)
    return Score(text.domain, tuple(losses.tolist()), tuple(choices.tolist()), int((choices == wanted).sum()))


def compare(scores: Sequence[Score], others: Sequence[Score] | None = None) -> list[DomainQuality]:
    """A line for every domain, in order of appearance; ``others`` are of the same texts by another model."""
    pairs: dict[str, list[tuple[Score, Score | None]]] = {}
    for number, one in enumerate(scores):
        pairs.setdefault(one.domain, []).append((one, others[number] if others else None))
    return [_domain(name, of) for name, of in pairs.items()]


def _domain(name: str, pairs: Sequence[tuple[Score, Score | None]]) -> DomainQuality:
    tokens = sum(len(one.losses) for one, _ in pairs)
    loss = sum(sum(one.losses) for one, _ in pairs) / tokens
    facts: dict[str, Any] = {"accuracy": sum(one.right for one, _ in pairs) / tokens}
    both = [(one, other) for one, other in pairs if other is not None]
    if both:
        against = sum(sum(other.losses) for _, other in both) / tokens
        same = sum(a == b for one, other in both for a, b in zip(one.choices, other.choices, strict=True))
        facts |= {"against": against, "delta": loss - against, "agreement": same / tokens}
        facts["accuracy_against"] = sum(other.right for _, other in both) / tokens
        lengths = [len(one.losses) for one, _ in both]
        facts["delta_error"] = _error([sum(one.losses) - sum(other.losses) for one, other in both], lengths)
        facts["accuracy_error"] = _error([one.right - other.right for one, other in both], lengths)
    return DomainQuality(name, len(pairs), tokens, loss, **facts)


def _error(sums: Sequence[float], lengths: Sequence[int]) -> float | None:
    """Standard error of ``sum(sums) / sum(lengths)``, texts (not tokens, which hang together) being the sample."""
    if len(sums) < 2:
        return None
    mean = sum(sums) / sum(lengths)
    residuals = [total - mean * length for total, length in zip(sums, lengths, strict=True)]
    return stdev(residuals) * math.sqrt(len(sums)) / sum(lengths)
