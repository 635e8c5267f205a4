"""Memory does not grow with the trace: ten million decisions in the memory of one million. Minutes: marked slow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from test_analysis_traces import Independent, write_trace

BOUND = 400 << 20
"""Bytes of resident memory at the peak, of which Python, numpy and pyarrow take about 150 MiB before any trace."""
SCRIPT = """
import json, sys
from pathlib import Path
from foregate.analysis.output import write
from foregate.analysis.study import analyse
write(analyse([Path(sys.argv[1])]), Path(sys.argv[2]), figures=False)
# VmHWM, because ru_maxrss of a new process begins at what its parent held.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps(int(status["VmHWM"].split()[0]) * 1024))
"""


def peak(trace: Path, out: Path) -> int:
    """Peak resident bytes of an analysis in a process of its own."""
    command = [sys.executable, "-c", SCRIPT, str(trace), str(out)]
    return int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_million_decisions_take_no_more_memory_than_one_million(tmp_path: Path) -> None:
    router = Independent(layers=16, experts=32, top_k=4)
    sizes = {}
    for prompts in (125, 1250):
        trace = write_trace(tmp_path / f"t{prompts}", router, prompts=prompts, tokens=500, domains=("a", "b"))
        sizes[prompts] = peak(trace, tmp_path / f"out{prompts}")
    facts = json.loads((tmp_path / "out1250" / "summary.json").read_text())["facts"]
    assert facts["decisions"] == 10_000_000
    print({prompts: f"{size / 2**20:.0f} MiB" for prompts, size in sizes.items()})
    assert sizes[1250] < BOUND
    assert sizes[1250] < sizes[125] + (128 << 20)
