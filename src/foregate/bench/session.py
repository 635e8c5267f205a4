"""Runs workers in their boxes and collects what they say. No arithmetic on results: see ``summary``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from foregate.bench.arms import Arm
from foregate.bench.lineup import SHORT, Lineup, run_rival, stream_for
from foregate.bench.worker import WorkerSpec
from foregate.checkpoint.locate import locate
from foregate.checkpoint.opening import open_checkpoint
from foregate.config import DEFAULT_READERS
from foregate.engine.memory import FIXED_OVERHEAD, overhead, plan_slots
from foregate.errors import ForegateError
from foregate.testing.cgroup import Box, Limits, confined


@dataclass(frozen=True, slots=True)
class Setting:
    """One cell of the grid: a budget, as ``--memory-budget`` has it, and bytes a second that the disk may give."""

    budget: str
    throttle_bps: int | None = None


@dataclass(slots=True)
class Outcome:
    """All runs of one setting. ``runs``: what ``Worker`` printed, one dict a run."""

    setting: Setting
    limit_bytes: int
    dense_s: float = 0.0
    runs: list[dict[str, Any]] = field(default_factory=list)
    peak_bytes: int | None = None
    rivals_failed: dict[str, str] = field(default_factory=dict)
    """Arm of a rival → why it did not get through."""


class Session:
    """Measures ``arms`` of ``model`` on ``prompts`` (name → token ids), ``tokens`` new tokens each, in ``rounds``."""

    def __init__(
        self,
        model: str,
        arms: Sequence[Arm],
        prompts: Mapping[str, Sequence[int]],
        *,
        tokens: int,
        rounds: int,
        threads: int | None,
        cgroup: str,
        lineup: Lineup | None = None,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._model, self._arms, self._prompts = model, arms, {name: list(ids) for name, ids in prompts.items()}
        self._tokens, self._rounds, self._threads, self._cgroup = tokens, rounds, threads, cgroup
        self._progress = progress
        self._lineup = lineup or Lineup()
        self._rivals = self._lineup.arms(resident=any(arm.whole for arm in arms))
        self._checkpoint = open_checkpoint(locate(model))

    @property
    def steps(self) -> int:
        """Runs of one setting."""
        return (len(self._arms) + len(self._rivals)) * self._rounds * len(self._prompts)

    def run(self, setting: Setting) -> Outcome:
        """Every arm under ``setting``. Raises ForegateError when a worker fails or is killed for memory.

        Without rivals one process does all rounds of our arms. With rivals, which are processes of their own, each
        round is a new process of ours and then one of each rival: A B A B all the same.
        """
        outcome = Outcome(setting, self._limit(setting.budget))
        if not self._rivals:
            self._ours(setting, outcome, self._rounds)
            return outcome
        for number in range(self._rounds):
            self._ours(setting, outcome, 1, first=number)
            for arm, name, whole in self._rivals:
                self._rival_round(outcome, arm, name, whole, number)
        return outcome

    def _ours(self, setting: Setting, outcome: Outcome, rounds: int, first: int = 0) -> None:
        small = [arm for arm in self._arms if not arm.whole]
        whole = [arm for arm in self._arms if arm.whole]
        if small:
            self._work(setting, setting.budget, small, outcome, rounds, first)
        if whole:
            self._work(setting, "100%", whole, outcome, rounds, first)

    def _rival_round(self, outcome: Outcome, arm: str, name: str, whole: bool, number: int) -> None:
        rival, prepared = self._lineup.ready[name]
        bps = outcome.setting.throttle_bps
        limit = outcome.limit_bytes if not whole else self._whole_limit(name)
        for prompt, ids in self._prompts.items():
            self._progress(f"{outcome.setting.budget} {arm}")
            if arm in outcome.rivals_failed or (number and name in SHORT):
                continue
            chosen = _chosen(outcome, prompt)
            tokens = {"prompt": ids, "stream": stream_for(name, chosen)}
            limits = Limits(limit, bps, prepared)
            threads = self._threads or torch.get_num_threads()
            try:
                found = run_rival(rival, prepared, tokens, limits, cgroup=self._cgroup, threads=threads)
            except ForegateError as error:
                outcome.rivals_failed[arm] = str(error)
                continue
            steps = [ms / 1e3 for ms in found["tpot_ms"]]
            line = {"kind": "run", "arm": arm, "prompt": prompt, "round": number, "step_s": steps}
            outcome.runs.append({**line, "rival": found, "limit_bytes": limit, "token_ids": chosen})

    def _whole_limit(self, name: str) -> int:
        """Room for every page of a rival's weights, and never less than our own all-resident arm has."""
        return max(self._limit("100%"), self._lineup.weight_bytes(name) + FIXED_OVERHEAD)

    def _limit(self, budget: str) -> int:
        """Dense weights + budget + the stated overhead: what the contract says is enough."""
        spec = self._checkpoint.spec
        readers = DEFAULT_READERS
        beside = overhead(slot_bytes=spec.expert_slot_bytes, readers=readers, packed=self._checkpoint.packed)
        plan = plan_slots(
            budget,
            slot_bytes=spec.expert_slot_bytes,
            experts=spec.experts,
            dense_bytes=spec.dense_bytes,
            overhead_bytes=beside,
        )
        return int(spec.dense_bytes + plan.budget_bytes + beside)

    def _work(
        self, setting: Setting, budget: str, arms: Sequence[Arm], outcome: Outcome, rounds: int, first: int
    ) -> None:
        spec = WorkerSpec(
            self._model, budget, self._threads, [WorkerSpec.arm(arm) for arm in arms], self._prompts,
            self._tokens, rounds,
        )  # fmt: skip
        limits = Limits(self._limit(budget), setting.throttle_bps, self._checkpoint.directory)
        with confined(limits, self._cgroup) as box:
            for line in self._lines(spec, box):
                if line["kind"] == "ready":
                    outcome.dense_s = outcome.dense_s or line["dense_s"]
                elif line["kind"] == "run":
                    outcome.runs.append({**line, "round": first + line["round"]})
                    self._progress(f"{setting.budget} {line['arm']}")
            if budget == setting.budget:
                outcome.peak_bytes = max(box.peak_bytes() or 0, outcome.peak_bytes or 0) or None

    def _lines(self, spec: WorkerSpec, box: Box) -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
            file = Path(folder) / "spec.json"
            file.write_text(json.dumps(asdict(spec)))
            command = box.command([sys.executable, "-m", "foregate.bench.worker", str(file)])
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, preexec_fn=box.join
            ) as worker:
                try:
                    yield from self._parse(worker)
                finally:
                    if worker.poll() is None:
                        worker.kill()
            if worker.returncode:
                errors.seek(0)
                said = errors.read().strip().splitlines()
                raise ForegateError(_why(worker.returncode, said[-1] if said else ""))

    @staticmethod
    def _parse(worker: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
        assert worker.stdout is not None
        for text in worker.stdout:
            line = json.loads(text)
            if line["kind"] == "error":
                raise ForegateError(line["message"])
            yield line
        worker.wait()


def _chosen(outcome: Outcome, prompt: str) -> list[int]:
    """The tokens that our engine chose for ``prompt``."""
    found: list[int] = next(run["report"]["token_ids"] for run in outcome.runs if run["prompt"] == prompt)
    return found


def _why(code: int, said: str) -> str:
    if code == -9:
        return "a benchmark process was killed: it needed more memory than budget, dense weights and overhead"
    return f"a benchmark process failed with exit code {code}: {said}"
