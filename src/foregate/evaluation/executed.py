"""What computing the guessed experts in place of the router's costs in quality: on held-out texts, and on problems.

After "speculating experts" (document B of the studies): predicted experts with predicted weights, nothing fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from foregate.checkpoint.locate import locate
from foregate.config import RunConfig, SamplingConfig
from foregate.datasets.prompt import Prompt
from foregate.engine.engine import Engine
from foregate.engine.lossy_quality import lossy_quality
from foregate.evaluation.held_out import HeldPrompt
from foregate.predictors.choice import SUFFIX
from foregate.trace.durable import write_file

MODE = "execute-predicted"
BUDGET = "100%"
"""Quick, and of no influence on the figures: a layer that was predicted runs its prediction whatever is resident."""
LENGTH = 256
ANSWER_TOKENS = 160
EXACT = "exact"
_ANSWER = re.compile(r"#### *\$?(-?[\d,]*\.?\d+)")
"""How a GSM8K solution ends."""

Facts = dict[str, Any]


@dataclass(frozen=True)
class Executed:
    """Measurements of ``model`` with predictors of the directory ``zoo`` (or, where it has none, by name).

    Each is kept as a file in ``out``: interrupted, the next one continues.
    """

    model: str
    zoo: Path
    out: Path

    def loss(self, predictor: str, texts: Sequence[tuple[str, str]], tokens: int) -> Facts:
        """``LossyQuality.as_dict``, of at most ``tokens`` a domain."""

        def measure() -> Facts:
            return lossy_quality(self._config(predictor), texts, tokens=tokens, length=LENGTH).as_dict()

        return self._kept(f"loss-{predictor}", measure)

    def answers(self, predictor: str, problems: Sequence[Prompt]) -> Facts:
        """Of greedily written solutions of GSM8K ``problems``: how many end in its format, and in the right number.

        ``predictor`` EXACT: by the router's own experts.
        """

        def measure() -> Facts:
            with Engine(self._config(predictor)) as engine:
                found = [(_number(_solve(engine, one.text)), _number(one.reference)) for one in problems]
            return {
                "problems": len(found),
                "in_format": sum(number is not None for number, _ in found),
                "right": sum(number is not None and number == right for number, right in found),
            }

        return self._kept(f"answers-{predictor}", measure)

    def _config(self, predictor: str) -> RunConfig:
        if predictor == EXACT:
            return RunConfig(model=self.model, memory_budget=BUDGET, predictor="none", threads=1)
        file = self.zoo / f"{predictor}{SUFFIX}"
        given = str(file) if file.is_file() else predictor
        return RunConfig(model=self.model, memory_budget=BUDGET, predictor=given, lossy=MODE, threads=1)

    def _kept(self, name: str, measure: Callable[[], Facts]) -> Facts:
        file = self.out / f"{name}.json"
        if not file.is_file():
            self.out.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps(measure()).encode())
        found: Facts = json.loads(file.read_text())
        return found


def held_texts(model: str, prompts: Sequence[HeldPrompt]) -> list[tuple[str, str]]:
    """(domain, text) of the prompts, each with the tokens that followed it in the trace."""
    tokenizer = AutoTokenizer.from_pretrained(locate(model))
    ids = [[*one.prefill_ids.tolist(), *one.token_id.tolist()] for one in prompts]
    return [(one.domain, str(tokenizer.decode(of))) for one, of in zip(prompts, ids, strict=True)]


def overall(facts: Mapping[str, Any]) -> dict[str, float]:
    """Of all domains together, by tokens; ``kept``: next-token accuracy over that of the exact run."""
    lines = facts["domains"]
    tokens = sum(line["tokens"] for line in lines)
    names = ("delta", "agreement", "accuracy", "accuracy_against")
    total = {name: sum(line[name] * line["tokens"] for line in lines) / tokens for name in names}
    return {**total, "kept": total["accuracy"] / total["accuracy_against"]}


def _solve(engine: Engine, problem: str) -> str:
    steps = engine.stream(engine.encode(problem), SamplingConfig(max_new_tokens=ANSWER_TOKENS))
    return str(engine.tokenizer.decode([step.token_id for step in steps]))


def _number(solution: str) -> float | None:
    found = _ANSWER.search(solution)
    return None if found is None else float(found[1].replace(",", ""))
