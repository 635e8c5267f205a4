"""What computing the guessed experts in place of the router's costs in quality: on held-out texts, and on problems.

After the "speculating experts" paper: the experts that the router wanted and nobody predicted are never fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from transformers import AutoTokenizer

from foregate.checkpoint.locate import locate
from foregate.config import RunConfig, SamplingConfig
from foregate.datasets.prompt import Prompt
from foregate.engine.engine import Engine
from foregate.engine.lossy_quality import lossy_quality
from foregate.errors import PredictorError, TraceError
from foregate.evaluation.held_out import HeldPrompt
from foregate.predictors import PREDICTORS
from foregate.predictors.choice import SUFFIX, check
from foregate.trace.durable import write_file
from foregate.types import FinishReason

EXACT = "the router's own"
MODE = "execute-predicted"
BUDGET = "100%"
"""Quick, and of no influence on the figures: a layer that was predicted runs its prediction whatever is resident."""
LENGTH = 256
"""Tokens of a text at most."""
ANSWER_TOKENS = 400
_LEAST = 0.5
"""Share of token-layers below which a predictor has failed: what it does not predict runs exactly."""

Facts = dict[str, Any]
Texts = Sequence[tuple[str, str]]
"""(domain, text)"""


@dataclass(frozen=True)
class Executed:
    """Measurements of ``model``, of this ``fingerprint``, with predictors of the directory ``zoo`` (or, where they need
    no training, by name).

    Each is kept as a file in ``out``, under everything that it depends on but the code: interrupted, the next one
    continues.
    """

    model: str
    fingerprint: str
    zoo: Path
    out: Path

    def expect(self, predictors: Sequence[str]) -> None:
        """Raises TraceError where one of them has not been trained, PredictorError for a file that is damaged."""
        for name in predictors:
            given = check(self._given(name))
            if given == name and getattr(PREDICTORS.load(name), "needs_file", False):
                raise TraceError(f"{self.zoo / (name + SUFFIX)}: file is missing; run make leaderboard first")

    def loss(self, predictor: str, texts: Texts, tokens: int) -> Facts:
        """``LossyQuality.as_dict``, ``tokens`` a domain at most. Raises PredictorError where nothing is predicted."""

        def measure() -> Facts:
            found = lossy_quality(self._config(predictor), texts, tokens=tokens, length=LENGTH).as_dict()
            _expect_predicted(predictor, found["deviation"]["predicted_share"])
            return found

        return self._kept("loss", predictor, {"texts": texts, "tokens": tokens, "length": LENGTH}, measure)

    def solutions(self, predictor: str, problems: Sequence[Prompt]) -> list[str | None]:
        """What is written greedily for ``problems``; None where it has no end. ``predictor`` EXACT: nothing lossy.

        Raises PredictorError where nothing is predicted.
        """

        def measure() -> Facts:
            with Engine(self._config(predictor)) as engine:
                written = [_solve(engine, one.text) for one in problems]
                if engine.deviation is not None:
                    _expect_predicted(predictor, engine.deviation.as_dict()["predicted_share"])
            return {"solutions": written}

        asked = {"problems": [one.text for one in problems], "tokens": ANSWER_TOKENS}
        found: list[str | None] = self._kept("solutions", predictor, asked, measure)["solutions"]
        return found

    def _given(self, predictor: str) -> str:
        file = self.zoo / f"{predictor}{SUFFIX}"
        return str(file) if file.is_file() else predictor

    def _config(self, predictor: str) -> RunConfig:
        if predictor == EXACT:
            return RunConfig(model=self.model, memory_budget=BUDGET, predictor="none", threads=1)
        given = self._given(predictor)
        return RunConfig(model=self.model, memory_budget=BUDGET, predictor=given, lossy=MODE, threads=1)

    def _kept(self, what: str, predictor: str, asked: Mapping[str, Any], measure: Callable[[], Facts]) -> Facts:
        given = Path(self._given(predictor))
        trained = xxhash.xxh3_64_hexdigest(given.read_bytes()) if given.is_file() else None
        known = json.dumps({**asked, "model": self.fingerprint, "mode": MODE, "trained": trained}, sort_keys=True)
        name = re.sub(r"\W+", "-", predictor)
        file = self.out / f"{what}-{name}-{xxhash.xxh3_64_hexdigest(known.encode())}.json"
        if not file.is_file():
            self.out.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps(measure()).encode())
        found: Facts = json.loads(file.read_text())
        return found


def held_texts(model: str, prompts: Sequence[HeldPrompt]) -> list[tuple[str, str]]:
    """(domain, text) of the prompts, each with what followed it in the trace."""
    tokenizer = AutoTokenizer.from_pretrained(locate(model))
    ids = [[*one.prefill_ids.tolist(), *one.token_id.tolist()] for one in prompts]
    return [(one.domain, str(tokenizer.decode(of))) for one, of in zip(prompts, ids, strict=True)]


def _expect_predicted(predictor: str, share: float) -> None:
    if share < _LEAST:
        raise PredictorError(f"predictor {predictor!r} predicted {share:.0%} of the layers: the rest ran exactly")


def _solve(engine: Engine, problem: str) -> str | None:
    steps = list(engine.stream(engine.encode(problem), SamplingConfig(max_new_tokens=ANSWER_TOKENS)))
    if steps[-1].finish is not FinishReason.STOP:
        return None
    return str(engine.tokenizer.decode([step.token_id for step in steps]))
