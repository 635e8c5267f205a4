"""What a lossy mode costs in quality and gains in time: the same texts, token by token, exactly and lossily.

Token by token, because prompts are read exactly in every mode: one pass over a text would measure nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

from foregate.config import RunConfig
from foregate.engine.deviation import Deviation
from foregate.engine.engine import Engine
from foregate.engine.quality import DomainQuality, Score, Text, choose_texts, compare, score_of
from foregate.errors import ConfigError

GIVEN = 16
"""Tokens at the beginning of a text that are read as its prompt, exactly, and not judged."""


@dataclass(frozen=True, slots=True)
class LossyQuality:
    """``domains``: loss of the lossy run, against the exact one. Times are mean seconds per judged token, both with the
    budget and settings of the configuration; on a machine that does other work they say little.

    ``deviation``: of the lossy run, over all texts, and by domain.
    """

    mode: str
    predictor: str
    memory_budget: str
    given: int
    domains: tuple[DomainQuality, ...]
    tpot_s: float
    exact_tpot_s: float
    deviation: dict[str, Any]
    deviation_by_domain: dict[str, dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "exact": False, "speedup": self.exact_tpot_s / self.tpot_s if self.tpot_s else 0.0}


def lossy_quality(
    config: RunConfig,
    prompts: Iterable[tuple[str, str]],
    *,
    tokens: int = 1000,
    length: int = 256,
    given: int = GIVEN,
    advance: Callable[[int], None] = lambda count: None,
) -> LossyQuality:
    """Judge ``config.lossy`` on the first ``prompts`` (domain, text), ``tokens`` of each domain, ``length`` a text.

    ``advance`` is told of tokens done; there are ``2 x`` as many as the texts have. Raises ConfigError for an exact
    configuration, and where no text is longer than ``given``.
    """
    if config.lossy is None:
        raise ConfigError("an exact configuration has no quality cost; choose a lossy mode")
    plain = replace(config, lossy=None, low_precision_pack=None)
    with Engine(plain) as engine:
        room = min(length, engine.context)
        found = choose_texts(prompts, lambda text: engine.tokenizer(text).input_ids, tokens=tokens, length=room)
        texts = [text for text in found if len(text.ids) > given]
        if not texts:
            raise ConfigError(f"no text has more than {given} tokens, which are given as a prompt")
        exact, exact_s, _ = _scores(engine, texts, given, advance)
        engine.reset(lossy=config.lossy, low_precision_pack=config.low_precision_pack)
        ours, ours_s, deviations = _scores(engine, texts, given, advance)
    judged = sum(len(score.losses) for score in ours)
    return LossyQuality(
        mode=config.lossy,
        predictor=config.predictor,
        memory_budget=config.memory_budget,
        given=given,
        domains=tuple(compare(ours, exact)),
        tpot_s=ours_s / judged,
        exact_tpot_s=exact_s / judged,
        deviation=_total(deviations.values()),
        deviation_by_domain={domain: found.as_dict() for domain, found in deviations.items()},
    )


def follow_score(engine: Engine, text: Text, given: int) -> tuple[Score, float]:
    """Score of the tokens of ``text`` after the first ``given``, and the seconds of the whole text."""
    began = perf_counter()
    logits = engine.follow(list(text.ids), given)
    seconds = perf_counter() - began
    return score_of(text, logits, given), seconds


def _scores(
    engine: Engine, texts: Sequence[Text], given: int, advance: Callable[[int], None]
) -> tuple[list[Score], float, dict[str, Deviation]]:
    """Of every text; seconds in all; deviations by domain. The cache keeps what earlier texts have brought."""
    scores: list[Score] = []
    seconds = 0.0
    found: dict[str, Deviation] = {}
    for text in texts:
        before = copy.copy(engine.deviation)
        score, took = follow_score(engine, text, given)
        scores.append(score)
        seconds += took
        if engine.deviation is not None and before is not None:
            found.setdefault(text.domain, type(before)()).add(engine.deviation.since(before))
        advance(len(text.ids))
    return scores, seconds, found


def _total(parts: Iterable[Deviation]) -> dict[str, Any]:
    whole: Deviation | None = None
    for part in parts:
        whole = whole or type(part)()
        whole.add(part)
    return {} if whole is None else whole.as_dict()
