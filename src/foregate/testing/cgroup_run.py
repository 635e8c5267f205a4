"""``python -m foregate.testing.cgroup_run``: a checkpoint four times the budget, run to the end under a hard limit.

The limit is dense weights + budget + the stated overhead; the kernel kills the process one page above it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from foregate.checkpoint.opening import open_checkpoint
from foregate.config import DEFAULT_READERS
from foregate.engine.memory import overhead
from foregate.errors import ForegateError
from foregate.testing.cgroup import run_limited
from foregate.testing.large import build_large


def main() -> int:
    """Build (once), run, report. Exit code 0 only if the run ended with all its tokens within the limit."""
    options = _options()
    source = options.dir
    if not (source / "config.json").exists():
        print(f"building {options.gigabytes:g} GB in {source}")
        build_large(source, total_bytes=int(options.gigabytes * 1e9))
    model = _packed(source) if options.packed else source
    spec = open_checkpoint(model).spec
    budget = spec.total_expert_bytes // options.times
    beside = overhead(slot_bytes=spec.expert_slot_bytes, readers=DEFAULT_READERS, packed=options.packed)
    limit = spec.dense_bytes + budget + beside
    command = [sys.executable, "-m", "foregate", "run", str(model), "--memory-budget", str(budget), "--json"]
    prompt = _long(source, options.prompt, options.prompt_tokens)
    command += ["--max-new-tokens", str(options.tokens), "-p", prompt, "--predictor", options.predictor]
    done = run_limited(command, limit, options.cgroup)
    if done.returncode != 0:
        print(f"failed with exit code {done.returncode} (-9: killed for memory): {done.stderr.strip()[-500:]}")
        return 1
    figures = json.loads(done.stdout)
    assert len(figures["token_ids"]) == options.tokens
    assert figures["prompt_tokens"] >= options.prompt_tokens
    report = {
        "experts_bytes": spec.total_expert_bytes,
        "dense_bytes": spec.dense_bytes,
        "budget_bytes": budget,
        "overhead_bytes": beside,
        "limit_bytes": limit,
        "cgroup_peak_bytes": done.peak_bytes,
        "prompt_tokens": figures["prompt_tokens"],
        **{name: figures[name] for name in ("rss_peak_bytes", "resident_bytes_peak", "ttft_s", "tpot_s", "direct_io")},
        "tokens": len(figures["token_ids"]),
        "outcome": "ran to the end",
    }
    print(json.dumps(report))
    return 0


def _packed(source: Path) -> Path:
    out = source.with_name(source.name + "-packed")
    subprocess.run([sys.executable, "-m", "foregate", "pack", str(source), str(out)], check=True)
    return out


def _long(source: Path, text: str, tokens: int) -> str:
    """``text``, again and again until it is at least ``tokens`` tokens long."""
    each = len(AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False)["input_ids"])
    return text * max(1, -(-tokens // each))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="where the checkpoint is, or will be built")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--times", type=int, default=4, help="experts are this many times the budget")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", default="The quick brown fox jumps over the lazy dog. " * 4)
    parser.add_argument("--prompt-tokens", type=int, default=0, help="the prompt again and again, at least this long")
    parser.add_argument("--predictor", default="next-gate")
    parser.add_argument("--packed", action="store_true", help="pack first, run from the pack")
    parser.add_argument("--cgroup", default="auto", help="auto, v1, v2 or systemd-run")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ForegateError as error:
        sys.exit(f"error: {error}")
