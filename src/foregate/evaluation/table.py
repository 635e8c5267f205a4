"""A result as tables: for the terminal, and as Markdown for documents. Both read the JSON, so they cannot disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

HEAD = ("predictor", "asked", "recall@k", "recall@2k", "exact", "top-1", "half", "Jaccard")
ONE_TABLE = 160
"""Columns of a terminal that has room for every column of the table."""
TAIL = ("late", "wasted", "µs/token", "parameters")


def ranked(result: Mapping[str, Any]) -> list[str]:
    """Names: controls first, then by share of the oracle's gain (mean over budgets), best first."""
    predictors = result["predictors"]
    controls = [name for name in ("oracle", "fresh-gate", "shuffled", "none") if name in predictors]
    rest = [name for name in predictors if name not in controls]
    return controls + sorted(rest, key=lambda name: (-_mean_gain(predictors[name]), name))


def columns(result: Mapping[str, Any]) -> list[str]:
    """Headings of ``rows``."""
    budgets = _budgets(result)
    return [*HEAD, *(f"misses {b}" for b in budgets), *(f"gain {b}" for b in budgets), *TAIL]


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One row a predictor, as text. ``misses``: recall on misses at equal bytes; ``gain``: share of the oracle's, with
    its sign: below 0 is slower than the cache alone."""
    budgets, policy = _budgets(result), result["about"]["policy"]
    middle = min(budgets, key=lambda budget: abs(float(budget.rstrip("%")) - 25))
    wide = str(2 * result["about"]["top_k"])
    out = []
    for name in ranked(result):
        one = result["predictors"][name]
        cell = one["cache"][policy][middle]
        spent = cell["useful_bytes"] + cell["late_bytes"] + cell["wasted_bytes"]
        out.append(
            [
                name,
                _moment(one),
                *(_percent(v) for v in (one["recall_at_k"], one["recall_at"][wide], one["exact_set"], one["top1"])),
                *(_percent(one[key]) for key in ("at_least_half", "jaccard")),
                *(_percent(one["recall_on_misses"][budget]) for budget in budgets),
                *(_percent(one["cache"][policy][budget]["oracle_gain"]) for budget in budgets),
                *(_percent(cell[f"{kind}_bytes"] / spent if spent else None) for kind in ("late", "wasted")),
                f"{one['us_per_token']:,.0f}",
                f"{one['parameters']:,}",
            ]
        )
    return out


def terminal(result: Mapping[str, Any], width: int) -> list[Table]:
    """For rich: one table where a terminal of ``width`` columns has room for it, else three with the same rows."""
    about = result["about"]
    title = (
        f"{about['prompts']} held-out prompts, {sum(about['tokens'].values()):,} tokens; cache {about['policy']}, "
        f"{about['reads_per_layer']} speculative reads a layer for every method; late and wasted: share of its reads"
    )
    names, body = columns(result), rows(result)
    if width >= ONE_TABLE:
        return [_table(title, names, body, range(len(names)))]
    first, last = len(HEAD), len(names) - len(TAIL)
    parts = ([*range(first)], [0, *range(first, last)], [0, *range(last, len(names))])
    return [_table(title if not n else None, names, body, part) for n, part in enumerate(parts)]


def _table(title: str | None, names: Sequence[str], body: Sequence[Sequence[str]], shown: Sequence[int]) -> Table:
    table = Table(title=title, title_justify="left")
    for number in shown:
        # Names of files may be long; numbers are never cut.
        table.add_column(names[number], justify="left" if number < 2 else "right", no_wrap=number > 1, overflow="fold")
    for row in body:
        table.add_row(*(row[number] for number in shown))
    return table


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers right-aligned from the third column on."""
    rule = ["---" if number < 2 else "---:" for number in range(len(head))]
    lines = [head, rule, *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _budgets(result: Mapping[str, Any]) -> list[str]:
    return list(next(iter(result["predictors"].values()))["recall_on_misses"])


def _mean_gain(one: Mapping[str, Any]) -> float:
    gains = [value or 0.0 for value in one["oracle_gain"].values()]
    return sum(gains) / len(gains)


def _moment(one: Mapping[str, Any]) -> str:
    short = {"before-attention": "before attn", "after-attention": "after attn", "after-routing": "after routing"}
    moments = "+".join(dict.fromkeys(short.get(moment, moment) for moment in one["moment"].split("+")))
    return f"{moments}, {one['lookahead']}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
