"""One process, one model, one budget: runs arms in turn, cold or warm as the arm says, and prints a JSON line a run.

``python -m foregate.bench.worker SPEC.json``, inside whatever limits the parent has set. The first line out says that
the model is loaded, and what its parts cost with every expert resident or not.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foregate.bench.arms import Arm
from foregate.bench.contention import ContentionWatch
from foregate.bench.dense import dense_seconds
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.errors import ForegateError
from foregate.predictors.oracle import Oracle, RouteRecorder


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker is to do. ``prompts``: name → token ids; every arm runs every prompt ``rounds`` times, of which the
    ``first`` bears that number.

    ``watch``: each arm once more before that, not timed, for what its reads cost its arithmetic.
    """

    model: str
    budget: str
    threads: int | None
    arms: list[dict[str, Any]]
    prompts: dict[str, list[int]]
    tokens: int
    rounds: int
    first: int = 0
    watch: bool = False

    @staticmethod
    def arm(arm: Arm) -> dict[str, Any]:
        """JSON form of an arm."""
        return {
            "name": arm.name, "settings": dict(arm.settings), "slots_of_top_k": arm.slots_of_top_k, "warm": arm.warm,
            "reads_all": arm.reads_all,
        }  # fmt: skip


class Worker:
    """Runs the arms of one spec."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._sampling = SamplingConfig(max_new_tokens=spec.tokens)
        self._routes: dict[str, RouteRecorder] = {}
        self._engine = Engine(
            RunConfig(spec.model, memory_budget=spec.budget, predictor="none", prefetch="auto", threads=spec.threads)
        )
        self._own_budget = str(self._engine.plan.budget_bytes)

    def run(self) -> None:
        """A first pass that is not counted learns each prompt's routing; then rounds of all arms, every other one
        backwards: A B, B A. Whoever always followed the same arm would be compared in the state that this leaves."""
        for name, ids in self._spec.prompts.items():
            self._routes[name] = self._record(ids)
        say({"kind": "ready", "dense_s": dense_seconds(self._engine), "load_s": self._engine.load_s})
        if self._spec.watch:
            for arm in self._spec.arms:
                say({"kind": "watched", "arm": arm["name"], **self._watch(arm)})
        for number in range(self._spec.first, self._spec.first + self._spec.rounds):
            arms = self._spec.arms[::-1] if number % 2 else self._spec.arms
            for name, ids in self._spec.prompts.items():
                for arm in arms:
                    say({"kind": "run", "arm": arm["name"], "prompt": name, "round": number, **self._measure(arm, ids)})
        self._engine.close()

    def _record(self, ids: list[int]) -> RouteRecorder:
        recorder = RouteRecorder()
        self._engine.observers.append(recorder)
        self._generate(ids)
        self._engine.observers.remove(recorder)
        return recorder

    def _watch(self, arm: dict[str, Any]) -> dict[str, Any]:
        """What reading costs the experts' arithmetic in ``arm``, on the first prompt."""
        self._prepare(arm, ids := next(iter(self._spec.prompts.values())))
        watch = ContentionWatch()
        leave = self._engine.listen(watch)
        self._generate(ids)
        leave()
        return watch.as_dict()

    def _measure(self, arm: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        self._prepare(arm, ids)
        self._generate(ids)
        assert self._engine.report is not None
        report = self._engine.report.as_dict()
        return {"report": report, "step_s": [step.stats.wall_s for step in self._engine.report.decode]}

    def _prepare(self, arm: dict[str, Any], ids: list[int]) -> None:
        """The engine as ``arm`` has it: an empty cache, or, if it is warm, what this very run leaves behind."""
        engine = self._engine
        engine.reset(**{**BASE, "memory_budget": self._budget(arm), **arm["settings"], **self._reads(arm)})
        engine.pool.commit()  # a new pool's first reads wait for the system's memory: the arm is not to be charged
        if isinstance(engine.predictor, Oracle):
            name = next(name for name, prompt in self._spec.prompts.items() if prompt == ids)
            engine.predictor.load(self._routes[name], (tuple(ids), self._sampling))
        if arm["warm"]:
            self._generate(ids)

    def _generate(self, ids: list[int]) -> None:
        for _ in self._engine.stream(ids, self._sampling):
            pass

    def _budget(self, arm: dict[str, Any]) -> str:
        times = arm["slots_of_top_k"]
        if not times:
            return self._own_budget
        spec = self._engine.spec
        return str(times * spec.top_k * spec.expert_slot_bytes)

    def _reads(self, arm: dict[str, Any]) -> dict[str, str]:
        return {"prefetch": str(self._engine.spec.top_k)} if arm["reads_all"] else {}


BASE = {
    name: getattr(RunConfig(), name)
    for name in ("predictor", "prefetch", "lookahead", "cache_policy", "reader_threads")
}


def say(value: dict[str, Any]) -> None:
    """One line of JSON to the parent."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    """The command line: a spec file."""
    try:
        Worker(WorkerSpec(**json.loads(Path(sys.argv[1]).read_text()))).run()
    except ForegateError as error:
        say({"kind": "error", "message": str(error)})
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
