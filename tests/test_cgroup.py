"""The budget under the kernel's eyes: a hard memory limit around a whole run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from foregate.testing.cgroup import available


@pytest.mark.slow
@pytest.mark.skipif(available() is None, reason="no memory limit can be set here: no writable cgroup, no systemd-run")
@pytest.mark.parametrize("packed", [False, True])
def test_a_prompt_of_two_thousand_tokens_stays_inside_budget_dense_and_overhead(tmp_path: Path, packed: bool) -> None:
    command = [
        sys.executable, "-m", "foregate.testing.cgroup_run", "--dir", str(tmp_path / "model"), "--gigabytes", "0.6",
        "--prompt-tokens", "2100", "--tokens", "4", *(["--packed"] if packed else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["prompt_tokens"] >= 2100
    assert found["limit_bytes"] == found["dense_bytes"] + found["budget_bytes"] + found["overhead_bytes"]
    assert found["budget_bytes"] * 4 <= found["experts_bytes"]
    assert found["resident_bytes_peak"] <= found["budget_bytes"]
