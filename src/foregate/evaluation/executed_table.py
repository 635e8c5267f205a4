"""Table and sentences about executing the guessed experts, with what was reported elsewhere beside."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foregate.datasets.prompt import Prompt
from foregate.evaluation import published
from foregate.evaluation.executed import ANSWER_TOKENS, EXACT, MODE, Executed, Facts, Texts
from foregate.evaluation.table import markdown

PREDICTED = (
    "stale-gate", "next-gate", "quasi-hidden", "estimator", "hybrid", "pre-attention-gate", "pre-attention", "fusion",
    "previous-token",
)  # fmt: skip
PROBLEMS = 40
_ANSWER = re.compile(r"#### *(-?\$?-?[\d,]*\.?\d+)")
"""How a GSM8K solution ends."""


@dataclass(frozen=True)
class Overall:
    """Of all domains together, by tokens. ``delta`` in nats a token; ``exact``: accuracy of the exact run, ``kept`` the
    share of it that is kept (None where it is 0). Errors are standard errors, that of ``kept`` with ``exact`` taken as
    known; None where a domain has but one text."""

    delta: float
    delta_error: float | None
    agreement: float
    exact: float
    kept: float | None
    kept_error: float | None


def overall(facts: Mapping[str, Any]) -> Overall:
    """Of ``LossyQuality.as_dict``."""
    lines = facts["domains"]
    shares = [line["tokens"] / sum(line["tokens"] for line in lines) for line in lines]

    def mean(name: str) -> float:
        return math.fsum(share * line[name] for share, line in zip(shares, lines, strict=True))

    def error(name: str) -> float | None:
        if any(line[name] is None for line in lines):
            return None
        return math.hypot(*(share * line[name] for share, line in zip(shares, lines, strict=True)))

    exact, spread = mean("accuracy_against"), error("accuracy_error")
    kept = mean("accuracy") / exact if exact else None
    kept_error = None if spread is None or not exact else spread / exact
    return Overall(mean("delta"), error("delta_error"), mean("agreement"), exact, kept, kept_error)


def executed_section(study: Executed, texts: Texts, problems: Sequence[Prompt], tokens: int) -> tuple[str, str]:
    """Of ``PREDICTED`` and the exact run, ``tokens`` a domain."""
    exact = study.solutions(EXACT, problems)
    loss = {name: study.loss(name, texts, tokens) for name in PREDICTED}
    lines = loss[PREDICTED[0]]["domains"]
    right = [one.reference for one in problems]
    body = [[EXACT, "100", *("0" for _ in lines), "0", "100", "100", "100", "0", *counts(exact, exact, right)]]
    for name, facts in loss.items():
        theirs = f"{published.EXECUTED[name]:g}" if name in published.EXECUTED else "–"
        body.append([name, theirs, *_cells(facts), *counts(study.solutions(name, problems), exact, right)])
    head = ["computed", "reported: score kept", *(f"loss, {line['domain']}" for line in lines), "loss, all"]
    head += ["accuracy kept", "same choice", "own set", "weight not run", "same solution", "in format", "right"]
    return markdown(head, body), " ".join(sentences(loss, problems, int(body[0][-1])))


def counts(solutions: Sequence[str | None], exact: Sequence[str | None], right: Sequence[str]) -> list[str]:
    """Solutions like the exact run's, in format, and right; None has no end and is none of these."""
    numbers = [None if text is None else number(text) for text in solutions]
    same = sum(one is not None and one == other for one, other in zip(solutions, exact, strict=True))
    correct = sum(n is not None and n == number(text) for n, text in zip(numbers, right, strict=True))
    return [str(same), str(sum(n is not None for n in numbers)), str(correct)]


def number(solution: str) -> float | None:
    """What a solution in the format of GSM8K ends with."""
    found = _ANSWER.search(solution)
    return None if found is None else float(found[1].replace(",", "").replace("$", ""))


def sentences(loss: Mapping[str, Facts], problems: Sequence[Prompt], solved: int) -> list[str]:
    """What the columns are, and what became of the claim. ``solved``: problems that the exact run gets right."""
    plain, ours = overall(loss["quasi-hidden"]), overall(loss["hybrid"])
    judged = sum(line["tokens"] for line in loss["hybrid"]["domains"])
    order = "holds" if ours.delta < plain.delta else "does not hold"
    doubt = _doubt(plain, ours)
    costs = f"{_thousandths(ours.delta, ours.delta_error)} and {_thousandths(plain.delta, plain.delta_error)}{doubt}"
    return [
        f"`--lossy {MODE}`, {judged:,} tokens of the held-out prompts and of what followed them, token by token. "
        "Loss: what is added to the exact run's, in thousandths of a nat, ± its standard error over texts. Accuracy: "
        f"the greedy choice is the text's next token, {100 * ours.exact:.1f} % exactly; the share of that which is "
        "kept. Own set: of layers that were predicted, those that ran what their router chose; weight not run: of the "
        "routers' weight in all layers. `pre-attention`, `fusion` and `previous-token` predict no weights: there the "
        "layer's own router weighs the predicted experts.",
        f"The last columns: {len(problems)} GSM8K problems ({problems[0].id} to {problems[-1].id}), solved greedily: "
        "solutions that are the exact run's, word for word, that end with a number in the format of GSM8K, and with "
        f"the right one; the exact run gets {solved} right{', too few to show a loss' * (solved < len(problems) / 4)}. "
        f"A solution without an end after {ANSWER_TOKENS} tokens counts in none of them.",
        f"That `hybrid` costs less than `quasi-hidden` {order} here by loss ({costs}). Of accuracy they keep "
        f"{_share_kept(ours)} and {_share_kept(plain)} %, where of a score of 0.817 {published.EXECUTED['hybrid']:g} "
        f"and {published.EXECUTED['quasi-hidden']:g} % were reported; what differs: {published.EXECUTED_SETUP}.",
    ]


def _cells(facts: Facts) -> list[str]:
    total, apart = overall(facts), facts["deviation"]
    cells = [_thousandths(line["delta"], line["delta_error"]) for line in facts["domains"]]
    cells += [_thousandths(total.delta, total.delta_error), _share_kept(total)]
    shares = (total.agreement, apart["set_agreement"], apart["router_mass_not_run"])
    return [*cells, *(f"{100 * share:.1f}" for share in shares)]


def _doubt(one: Overall, other: Overall) -> str:
    """Of two losses on the same texts: their errors, taken as independent, are at least those of the difference."""
    if one.delta_error is None or other.delta_error is None:
        return ", of unknown errors"
    error = math.hypot(one.delta_error, other.delta_error)
    return "" if abs(one.delta - other.delta) > error else ", within the errors"


def _thousandths(value: float, error: float | None) -> str:
    return f"{1000 * value:+.1f}" + ("" if error is None else f" ± {1000 * error:.1f}")


def _share_kept(total: Overall) -> str:
    if total.kept is None:
        return "–"
    return f"{100 * total.kept:.1f}" + ("" if total.kept_error is None else f" ± {100 * total.kept_error:.1f}")
