"""Traces of the reference model: five domains into one directory, and the small one that ships with the package.

``python -m foregate.trace.make_traces --data-dir DIR`` (gsm8k_test.jsonl and mmlu/ lie there) runs ``foregate trace``
for each; interrupted or killed, it continues where it was. ``--sample`` writes the shipped trace instead.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from foregate.errors import TraceError
from foregate.trace.reader import TraceReader
from foregate.trace.sample import SAMPLE

SAMPLE_LIMIT = 2_300_000
"""Bytes that the shipped trace may take."""

DOMAINS: dict[str, tuple[Sequence[str], int, int]] = {
    "mathematics": (("gsm8k", "--data-dir", "{data}"), 500, 64),
    "code": (("humaneval",), 164, 96),
    "prose": (("held-out", "--split", "prose"), 240, 64),
    "mmlu": (("mmlu", "--data-dir", "{data}"), 225, 16),
    "synthetic": (("synthetic",), 300, 64),
}
"""Domain → data set and its options, prompts, tokens after each: about 150,000 tokens, 2.4 M decisions at 16 layers."""

SAMPLE_PROMPTS, SAMPLE_TOKENS = 14, 32


def commands(model: str, out: Path, data: Path, *, sample: bool) -> list[list[str]]:
    """Arguments of ``foregate`` for every domain. The sample keeps the choice and the timings, the rest scores too."""
    found = []
    for domain, (dataset, prompts, tokens) in DOMAINS.items():
        options = [option.format(data=data) for option in dataset]
        limits = (SAMPLE_PROMPTS, SAMPLE_TOKENS) if sample else (prompts, tokens)
        found.append(["trace", model, "--dataset", *options, "--out", str(out / domain), "--resume"])
        found[-1] += ["--limit", str(limits[0]), "--max-new-tokens", str(limits[1]), "--threads", "1"]
        found[-1] += ["--timings"] if sample else ["--scores", "--timings"]
    return found


def run(arguments: Sequence[str]) -> None:
    """One ``foregate`` command. Raises TraceError where it fails, or was told to stop before its end."""
    print("foregate", *arguments, file=sys.stderr, flush=True)
    if subprocess.run([sys.executable, "-m", "foregate", *arguments], check=False).returncode:
        raise TraceError(f"foregate {' '.join(arguments)} failed")
    if arguments[0:2] != ["trace", "merge"] and not TraceReader(arguments[arguments.index("--out") + 1]).complete:
        raise TraceError(f"foregate {' '.join(arguments)} was stopped; run again to continue")


def make_sample(model: str, out: Path, data: Path) -> int:
    """Write SAMPLE by way of ``out``; returns its bytes. Raises TraceError where they are too many."""
    for arguments in commands(model, out, data, sample=True):
        run(arguments)
    merged = out / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    run(["trace", "merge", *(str(out / domain) for domain in DOMAINS), "--out", str(merged)])
    nbytes = sum(path.stat().st_size for path in merged.rglob("*") if path.is_file())
    if nbytes > SAMPLE_LIMIT:
        raise TraceError(f"{merged} has {nbytes:,} bytes; the shipped trace may have {SAMPLE_LIMIT:,}")
    shutil.rmtree(SAMPLE, ignore_errors=True)
    shutil.copytree(merged, SAMPLE)
    return nbytes


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m foregate.trace.make_traces", description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=None, help="default: out/traces, or out/sample-traces")
    parser.add_argument("--sample", action="store_true", help="write the trace that ships with the package")
    given = parser.parse_args(arguments)
    out = given.out or Path("out") / ("sample-traces" if given.sample else "traces")
    if given.sample:
        print(f"{make_sample(given.model, out, given.data_dir):,} bytes in {SAMPLE}")
        return
    for command in commands(given.model, out, given.data_dir, sample=False):
        run(command)
    rows = sum(TraceReader(out / domain).rows for domain in DOMAINS)
    print(f"{rows:,} routing decisions in {out}")


if __name__ == "__main__":
    try:
        main()
    except TraceError as error:
        raise SystemExit(f"error: {error}") from None
