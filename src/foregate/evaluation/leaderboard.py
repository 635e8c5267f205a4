"""``make leaderboard``: record traces, train the zoo, evaluate it, write the table. Every step resumes where it was.

``python -m foregate.evaluation.leaderboard --data-dir DIR`` runs ``foregate trace``, ``train`` and ``evaluate``, keeps
the result as dev/results/NAME.json and writes dev/LEADERBOARD.md from all results there (``--table``: only that).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from foregate.errors import ForegateError, TraceError
from foregate.evaluation.settings import CONTROLS
from foregate.evaluation.table import columns, markdown, ranked, rows
from foregate.predictors.choice import SUFFIX
from foregate.trace.reader import TraceReader
from foregate.training import TRAINERS

DOMAINS: dict[str, tuple[Sequence[str], int]] = {
    "mathematics": (("gsm8k", "--data-dir", "{data}"), 440),
    "code": (("humaneval",), 164),
    "prose": (("held-out", "--split", "prose"), 400),
    "synthetic": (("synthetic",), 150),
}
"""Domain → data set and its options, prompts. The zoo is trained and judged on the real ones, the first three."""

REAL = ("mathematics", "code", "prose")
ELSEWHERE = ("pre-attention", "sequence", "markov")
"""Methods that are also trained on one domain alone (code; synthetic prompts) and judged on all."""

COMBINED = (
    "next-gate@2",
    "next-gate+{pre-attention}",
    "{sequence}+{pre-attention}",
    "{fusion}+{pre-attention}",
)
"""Combinations that are evaluated; {NAME} is the trained file of a method."""


LIMITS = ("--tokens", "4000", "--sim-tokens", "300")
"""Held-out tokens that are scored, and those that are simulated in time: so that two cores are done in minutes."""


def trace_commands(model: str, out: Path, data: Path, scale: float) -> list[list[str]]:
    """``foregate trace`` for every domain: features and scores, the text itself as the continuation."""
    found = []
    for domain, (dataset, prompts) in DOMAINS.items():
        options = [option.format(data=data) for option in dataset]
        command = [
            "trace",
            model,
            "--dataset",
            *options,
            "--out",
            str(out / "traces" / domain),
            "--resume",
            "--resident",
        ]
        command += ["--limit", str(max(10, round(prompts * scale))), "--threads", "1", "--scores"]
        command += ["--features", "pre_attention,residual,router_input"]
        found.append(command + ([] if domain == "synthetic" else ["--teacher-forced"]))
    return found


def train_commands(model: str, out: Path, jobs: int) -> list[list[str]]:
    """``foregate train``: every method on all real domains, and some on one domain alone."""
    every = ["train", "--all", "--jobs", str(jobs), "--threads", "1", *_traces(out, REAL), "--out", str(out / "zoo")]
    commands = [[*every, *_where(model)]]
    for method in ELSEWHERE:
        for domain in ("code", "synthetic"):
            file = out / "elsewhere" / f"{method}-from-{domain}{SUFFIX}"
            if method in TRAINERS.names and not file.is_file():
                commands.append(["train", "--predictor", method, *_traces(out, (domain,)), "--out", str(file)])
    return commands


def evaluate_command(model: str, out: Path, jobs: int) -> list[str]:
    """``foregate evaluate`` of everything: registered methods, strangers' included, files, combinations."""
    files = {path.name.removesuffix(SUFFIX): str(path) for path in sorted((out / "zoo").glob(f"*{SUFFIX}"))}
    command = ["evaluate", *_traces(out, REAL), "--all", "--predictors-dir", str(out / "zoo"), "--jobs", str(jobs)]
    command += _where(model)
    for path in sorted((out / "elsewhere").glob(f"*{SUFFIX}")):
        command += ["--predictor", str(path)]
    for text in COMBINED:
        wanted = re.findall(r"{(.+?)}", text)
        if all(name in files for name in wanted):
            for name in wanted:
                text = text.replace("{" + name + "}", files[name])
            command += ["--predictor", text]
    return [*command, *LIMITS, "--out", str(out / "evaluation")]


def _where(model: str) -> list[str]:
    """``--model`` for a directory: traces know a model's name alone."""
    return ["--model", model] if Path(model).is_dir() else []


def fresh(out: Path) -> bool:
    """Whether out/evaluation is newer than every trace and predictor file."""
    done = out / "evaluation" / "result.json"
    inputs = [*out.glob("traces/*/manifest.jsonl"), *out.glob(f"zoo/*{SUFFIX}"), *out.glob(f"elsewhere/*{SUFFIX}")]
    return done.is_file() and all(path.stat().st_mtime <= done.stat().st_mtime for path in inputs)


def write_table(results: Path, path: Path) -> None:
    """The leaderboard from every result in ``results``, newest trace hash first by name. Raises TraceError for none."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    if not found:
        raise TraceError(f"{results}: no result (*.json) to make a leaderboard from")
    head = (
        "# Leaderboard\n\nGenerated by `make leaderboard DATA=DIR` from `dev/results/*.json`; not edited by hand. "
        "What the columns mean: [docs/evaluate.md](../docs/evaluate.md). Rates in %.\n"
    )
    path.write_text("\n".join([head, *(_section(name, result) for name, result in found.items())]))


def _section(name: str, result: Mapping[str, Any]) -> str:
    about = result["about"]
    tokens = ", ".join(f"{domain} {count:,}" for domain, count in about["tokens"].items())
    intro = (
        f"## {name}\n\nModel {about['model_name']} ({result['model'][:12]}), trace {result['trace']}, commit "
        f"{result['commit']}. {about['prompts']} held-out prompts of {about['prompts_in_traces']} "
        f"(decode tokens: {tokens}); "
        f"{about['layers']} layers, top-{about['top_k']} of {about['experts']}. Cache {about['policy']}, "
        f"{about['reads_per_layer']} speculative reads a layer and token for every method.\n"
    )
    parts = [intro, markdown(columns(result), rows(result)), _verdict(result), _domains(result)]
    controls = "".join(f"- control {line}\n" for line in about["controls"])
    left_out = "".join(f"- left out: {who}: {why}\n" for who, why in about["left_out"].items())
    return "\n".join([*parts, controls + left_out])


def _verdict(result: Mapping[str, Any]) -> str:
    """Whether ours beat the published methods: a line a budget, made from the numbers."""
    predictors = {n: one for n, one in result["predictors"].items() if n not in CONTROLS and "-from-" not in n}
    published = [n for n, one in predictors.items() if one.get("source") not in ("", "ours", None) and "+" not in n]
    ours = [name for name in predictors if name not in published]
    groups = {"ours and combinations": ours, "published methods": published}
    lines = []
    for budget in next(iter(predictors.values()))["oracle_gain"] if predictors else ():
        gain = {name: one["oracle_gain"][budget] or 0.0 for name, one in predictors.items()}
        best = {kind: max(names, key=gain.__getitem__) for kind, names in groups.items() if names}
        said = "; ".join(f"best of {kind}: {name} {100 * gain[name]:.1f} %" for kind, name in best.items())
        lines.append(f"- share of the oracle's gain at {budget}: {said}\n")
    return "".join(lines)


def _domains(result: Mapping[str, Any]) -> str:
    """Recall, misses and gain in every domain, at the budget nearest to a quarter."""
    domains = list(result["about"]["tokens"])
    budgets = list(next(iter(result["predictors"].values()))["oracle_gain"])
    budget = min(budgets, key=lambda text: abs(float(text.rstrip("%")) - 25))
    head = ["by domain", "trained on", *(f"{what} {d}" for d in domains for what in ("recall@k", "misses", "gain"))]
    body = []
    for name in ranked(result):
        one = result["predictors"][name]
        row = [name, ", ".join(one.get("trained_on", [])) or "–"]
        for domain in domains:
            here = one["by_domain"][domain]
            values = (here["recall_at_k"], here["recall_on_misses"][budget], here["oracle_gain_signed"][budget])
            row += ["–" if value is None else f"{100 * value:.1f}" for value in values]
        body.append(row)
    return markdown(head, body)


def trace_options(traces: Sequence[Path]) -> list[str]:
    """``--trace`` for each."""
    return [text for trace in traces for text in ("--trace", str(trace))]


def _traces(out: Path, domains: Sequence[str]) -> list[str]:
    return trace_options([out / "traces" / domain for domain in domains])


def run_command(arguments: Sequence[str]) -> None:
    """One ``foregate`` command. Raises TraceError where it fails, or was told to stop before its end."""
    began = perf_counter()
    print("foregate", *arguments, file=sys.stderr, flush=True)
    if subprocess.run([sys.executable, "-m", "foregate", *arguments], check=False).returncode:
        raise TraceError(f"foregate {' '.join(arguments)} failed; run again to continue")
    if arguments[0] == "trace" and not TraceReader(arguments[arguments.index("--out") + 1]).complete:
        raise TraceError(f"foregate {' '.join(arguments)} was stopped; run again to continue")
    print(f"  {perf_counter() - began:,.0f} s", file=sys.stderr, flush=True)


def _keep(result: Path, kept: Path) -> None:
    """A small copy of a result for the repository: one line a predictor."""
    found = json.loads(result.read_text())
    rest = {key: value for key, value in found.items() if key != "predictors"}
    lines = [f"{json.dumps(name)}: {json.dumps(one, ensure_ascii=False)}" for name, one in found["predictors"].items()]
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text('{"predictors": {\n' + ",\n".join(lines) + "\n},\n" + json.dumps(rest)[1:-1] + "}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m foregate.evaluation.leaderboard", description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--name", default=None, help="of the result in dev/results; the model's if not given")
    parser.add_argument("--data-dir", type=Path, default=None, help="directory with gsm8k_test.jsonl")
    parser.add_argument("--out", type=Path, default=Path("out/leaderboard"), help="traces and predictor files")
    parser.add_argument("--dev", type=Path, default=Path("dev"), help="where LEADERBOARD.md and results/ lie")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the prompts, for a quick try")
    parser.add_argument("--table", action="store_true", help="write the table alone, from the results that are there")
    given = parser.parse_args(arguments)
    name = given.name or Path(given.model).name
    if not given.table:
        if given.data_dir is None:
            raise TraceError("--data-dir is missing: the directory with gsm8k_test.jsonl")
        for command in trace_commands(given.model, given.out, given.data_dir, given.scale):
            run_command(command)
        (given.out / "elsewhere").mkdir(parents=True, exist_ok=True)
        for command in train_commands(given.model, given.out, given.jobs):
            run_command(command)
        if not fresh(given.out):
            run_command(evaluate_command(given.model, given.out, given.jobs))
        _keep(given.out / "evaluation" / "result.json", given.dev / "results" / f"{name}.json")
    write_table(given.dev / "results", given.dev / "LEADERBOARD.md")
    print(given.dev / "LEADERBOARD.md")


if __name__ == "__main__":
    try:
        main()
    except ForegateError as error:
        raise SystemExit(f"error: {error}") from None
