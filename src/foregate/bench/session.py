"""Runs workers in their boxes and collects what they say. No arithmetic on results: see ``summary``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from foregate.bench.arms import RESIDENT, Arm
from foregate.bench.lineup import SHORT, Lineup, run_rival, stream_for
from foregate.bench.rivals.readahead import HeldError
from foregate.bench.usage import Usage, gauged
from foregate.bench.worker import WorkerSpec
from foregate.checkpoint.locate import locate
from foregate.checkpoint.opening import open_checkpoint
from foregate.config import DEFAULT_READERS
from foregate.engine.memory import FIXED_OVERHEAD, SlotPlan, overhead, plan_slots
from foregate.errors import ForegateError, KilledError
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
    warm: bool = False
    """The budget holds every expert: all arms run warm."""
    watched: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arm → what ``contention`` found in it."""
    rivals_failed: dict[str, str] = field(default_factory=dict)
    """Arm of a rival → why it did not get through."""
    uses: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Process → its limit, and the most that it used of it: ``foregate``, ``foregate:all-resident``, rivals' arms."""

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Outcome:
        """What ``asdict`` made."""
        return cls(**{**kept, "setting": Setting(**kept["setting"])})

    def used(self, process: str, limit_bytes: int, usage: Mapping[str, int] | None) -> None:
        """Keep the most of every run of ``process``."""
        before = self.uses.setdefault(process, {"limit_bytes": limit_bytes})
        for name, nbytes in (usage or {}).items():
            before[name] = max(nbytes, before.get(name, 0))


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
        overhead_bytes: int | None = None,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._model, self._arms, self._prompts = model, arms, {name: list(ids) for name, ids in prompts.items()}
        self._tokens, self._rounds, self._threads, self._cgroup = tokens, rounds, threads, cgroup
        self._progress = progress
        self._lineup = lineup or Lineup()
        self._checkpoint = open_checkpoint(locate(model))
        readers = DEFAULT_READERS
        slot_bytes, packed = self._checkpoint.spec.expert_slot_bytes, self._checkpoint.packed
        self.stated_overhead = overhead(slot_bytes=slot_bytes, readers=readers, packed=packed)
        self.overhead_bytes = self.stated_overhead if overhead_bytes is None else overhead_bytes

    def steps(self, setting: Setting) -> int:
        """Runs of one setting."""
        return (len(self._arms) + len(self._rivals(setting))) * self._rounds * len(self._prompts)

    def holds_all(self, setting: Setting) -> bool:
        """Whether the budget has a slot for every expert: such a cell runs warm."""
        return self._plan(setting.budget).slots == self._checkpoint.spec.experts

    def run(self, setting: Setting) -> Outcome:
        """Every arm under ``setting``. Raises ForegateError when a worker fails or is killed for memory.

        Without rivals one process does all rounds of our arms. With rivals, which are processes of their own, each
        round is a new process of ours and then one of each rival.
        """
        outcome = Outcome(setting, self._limit(setting.budget), warm=self.holds_all(setting))
        rivals = self._rivals(setting)
        if not rivals:
            self._ours(setting, outcome, self._rounds)
            return outcome
        for number in range(self._rounds):
            self._ours(setting, outcome, 1, first=number)
            for arm, name, whole in rivals:
                self._rival_round(outcome, arm, name, whole, number)
        return outcome

    def trial(self, overhead_bytes: int) -> Mapping[str, int] | None:
        """The first arm on the longest prompt with a full pool of a few slots and so much overhead: what it used.

        Raises KilledError where that is too little.
        """
        spec = self._checkpoint.spec
        name = max(self._prompts, key=lambda name: len(self._prompts[name]))
        # a prompt streams through every slot of so small a pool, so all of it is committed
        budget = str(self.trial_slots * spec.expert_slot_bytes)
        arm = next((arm for arm in self._arms if not arm.whole), self._arms[0])
        given = WorkerSpec(
            self._model, budget, self._threads, [WorkerSpec.arm(arm)], {name: self._prompts[name]},
            min(self._tokens, TRIAL_TOKENS), 1,
        )  # fmt: skip
        limit = self._plan(budget).budget_bytes + spec.dense_bytes + overhead_bytes
        usage, _ = self._confined(given, Limits(limit), lambda line: None)
        return usage.as_dict()

    @property
    def trial_slots(self) -> int:
        """Slots of ``trial``'s pool."""
        return min(4 * self._checkpoint.spec.top_k, self._checkpoint.spec.experts)

    @property
    def trial_held(self) -> int:
        """Bytes that ``trial`` holds beside its overhead: its pool, and dense weights."""
        return self.trial_slots * self._checkpoint.spec.expert_slot_bytes + self._checkpoint.spec.dense_bytes

    def _rivals(self, setting: Setting) -> list[tuple[str, str, bool]]:
        resident = any(arm.whole for arm in self._arms)
        return self._lineup.arms(resident=resident, warm=self.holds_all(setting))

    def _ours(self, setting: Setting, outcome: Outcome, rounds: int, first: int = 0) -> None:
        small = [replace(arm, warm=outcome.warm) for arm in self._arms if not arm.whole]
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
                found = run_rival(rival, prepared, tokens, limits, cgroup=self._cgroup, threads=threads, warm=whole)
            except HeldError:
                # another benchmark runs: nothing measured beside it would mean anything, nor is it the rival's failure
                raise
            except ForegateError as error:
                outcome.rivals_failed[arm] = str(error)
                continue
            outcome.used(arm, limit, found["uses"])
            steps = [ms / 1e3 for ms in found["tpot_ms"]]
            line = {"kind": "run", "arm": arm, "prompt": prompt, "round": number, "step_s": steps}
            outcome.runs.append({**line, "rival": found, "limit_bytes": limit, "token_ids": chosen})

    def _whole_limit(self, name: str) -> int:
        """Room for every page of a rival's weights, and never less than our own all-resident arm has."""
        return max(self._limit("100%"), self._lineup.weight_bytes(name) + FIXED_OVERHEAD)

    def _limit(self, budget: str) -> int:
        """Dense weights + budget + overhead: the stated one is what the contract says is enough."""
        return int(self._checkpoint.spec.dense_bytes + self._plan(budget).budget_bytes + self.overhead_bytes)

    def _plan(self, budget: str) -> SlotPlan:
        spec = self._checkpoint.spec
        return plan_slots(
            budget,
            slot_bytes=spec.expert_slot_bytes,
            experts=spec.experts,
            dense_bytes=spec.dense_bytes,
            overhead_bytes=self.overhead_bytes,
        )

    def _work(
        self, setting: Setting, budget: str, arms: Sequence[Arm], outcome: Outcome, rounds: int, first: int
    ) -> None:
        spec = WorkerSpec(
            self._model, budget, self._threads, [WorkerSpec.arm(arm) for arm in arms], self._prompts,
            self._tokens, rounds, first, watch=first == 0,
        )  # fmt: skip
        limits = Limits(self._limit(budget), setting.throttle_bps, self._checkpoint.directory)

        def hear(line: dict[str, Any]) -> None:
            if line["kind"] == "ready":
                outcome.dense_s = outcome.dense_s or line["dense_s"]
            elif line["kind"] == "watched":
                outcome.watched[line["arm"]] = {k: v for k, v in line.items() if k not in ("kind", "arm")}
            elif line["kind"] == "run":
                outcome.runs.append(line)
                self._progress(f"{setting.budget} {line['arm']}")

        usage, peak = self._confined(spec, limits, hear)
        whole = arms[0].whole
        outcome.used(f"foregate:{RESIDENT}" if whole else "foregate", limits.memory_bytes, usage.as_dict())
        if not whole:
            outcome.peak_bytes = max(peak or 0, outcome.peak_bytes or 0) or None

    def _confined(
        self, spec: WorkerSpec, limits: Limits, hear: Callable[[dict[str, Any]], None]
    ) -> tuple[Usage, int | None]:
        """A worker in a box, each of its lines told to ``hear``; what it used, and the group's peak."""
        with confined(limits, self._cgroup) as box:
            with gauged(box) as usage:
                for line in self._lines(spec, box):
                    hear(line)
            return usage, box.peak_bytes()

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
                raise _error(worker.returncode, said[-1] if said else "")

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


def _error(code: int, said: str) -> ForegateError:
    if code in (-9, 137):
        return KilledError("a benchmark process was killed: it needed more than budget, dense weights and overhead")
    return ForegateError(f"a benchmark process failed with exit code {code}: {said}")


TRIAL_TOKENS = 4
