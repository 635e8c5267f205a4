"""One candidate on every held-out prompt: what it says, what that covers, what it is worth in simulated time.

Shapes: P prompts, L MoE layers, M metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.analysis.replay import Keys
from foregate.analysis.worths import ECHO
from foregate.errors import CheckpointError, ConfigError
from foregate.evaluation.accuracy import count, metric_names
from foregate.evaluation.asking import NOTHING, Answers, ask, seconds_per_token
from foregate.evaluation.candidates import Candidate, split_lookahead
from foregate.evaluation.held_out import HeldOut
from foregate.evaluation.misses import covered, echo_worths, residents
from foregate.evaluation.provenance import provenance
from foregate.evaluation.settings import Settings
from foregate.evaluation.trace_signals import TraceSignals, open_routers
from foregate.interfaces import Predictor
from foregate.predictors.choice import make_predictor
from foregate.sim.replay import Plan, SimResult, Simulation, decode_events

Array = NDArray[np.float64]
Cell = tuple[str, float]
"""Cache policy and residency."""


@dataclass(slots=True)
class Judged:
    """What was counted. ``sums`` [P, M, L] and ``made`` [P, L]: see ``accuracy.count``; ``by_lead``: lead → every
    metric summed and, last, rankings made, [P, M + 1]. ``covered``: cell → covered, missing, read [P, 3, L].
    ``stalls``: cell → virtual seconds [simulated P]."""

    candidate: Candidate
    metrics: tuple[str, ...]
    sums: Array
    made: Array
    by_lead: dict[int, Array] = field(default_factory=dict)
    covered: dict[Cell, Array] = field(default_factory=dict)
    sims: dict[Cell, SimResult] = field(default_factory=dict)
    stalls: dict[Cell, Array] = field(default_factory=dict)
    us_per_token: float = 0.0
    parameters: int = 0
    flops: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Traces, routers and caches that every candidate is judged with."""

    def __init__(self, settings: Settings) -> None:
        """Raises TraceError (no held-out prompt, different models), CheckpointError, ConfigError."""
        self.settings = settings
        self.held = HeldOut(settings.traces, settings.tokens)
        self.shape = self.held.shape
        self.reads = settings.reads or max(self.shape.top_k)
        self.slots = {share: int(self.shape.total * share + 1e-9) for share in settings.residencies}
        for share, slots in self.slots.items():
            if slots < max(self.shape.top_k):
                raise ConfigError(
                    f"budget {share:.3%} is {slots} of {self.shape.total} experts: one layer chooses more"
                )
        self.prompts = self.held.load()
        self.routers, self.no_routers = self._routers()
        self._residents: dict[Cell, list[NDArray[np.bool_]]] = {}
        self.worths: list[NDArray[np.float32]] | None = None
        """What the policy ``echo`` knows; ``scored``: router scores, not choices alone."""
        self.scored = False
        if ECHO in settings.policies:
            self.worths, self.scored = echo_worths(self.prompts, self.shape)
        self._keys = Keys(self.shape)
        total = np.cumsum([prompt.tokens for prompt in self.prompts])
        self.simulated = min(len(self.prompts), 1 + int(np.searchsorted(total, settings.sim_tokens)))
        self._future = [e for p in self.prompts[: self.simulated] for e in decode_events(self._keys, p.experts)]

    @property
    def cells(self) -> list[Cell]:
        """Every cache that is simulated."""
        return [(policy, share) for policy in self.settings.policies for share in self.settings.residencies]

    @property
    def domains(self) -> list[str]:
        """Of each prompt."""
        return [prompt.domain for prompt in self.prompts]

    def judge(self, candidate: Candidate) -> Judged:
        """Raises ConfigError or PredictorError where it cannot be asked on these traces."""
        predictors = [self._make(member) for member in candidate.members]
        signals = TraceSignals(self.shape, self.routers)
        said = [[ask(predictor, signals, prompt, self.shape) for predictor in predictors] for prompt in self.prompts]
        judged = self._score(candidate, said)
        for cell in self.cells:
            self._simulate(judged, said, cell)
        plain = TraceSignals(self.shape, self.routers, batched=False)
        longest = max(self.prompts, key=lambda prompt: prompt.tokens)
        judged.us_per_token = sum(1e6 * seconds_per_token(p, plain, longest, self.shape) for p in predictors)
        judged.parameters = sum(predictor.cost().parameters for predictor in predictors)
        judged.flops = sum(predictor.cost().flops for predictor in predictors)
        judged.facts = {**_facts(predictors), **provenance(candidate, self.held)}
        return judged

    def _make(self, member: str) -> Predictor:
        text, lookahead = split_lookahead(member)
        if lookahead is None and text not in ("fresh-gate", "none"):
            lookahead = self.settings.lookahead
        deepest = max(1, self.shape.layers - 1)
        if lookahead is not None and lookahead > deepest:
            raise ConfigError(f"lookahead {lookahead}: at most {deepest} with {self.shape.layers} MoE layers")
        return make_predictor(text, lookahead, lambda: self.held.identity)

    def _score(self, candidate: Candidate, said: Sequence[Sequence[Answers]]) -> Judged:
        names = metric_names(self.shape)
        prompts, layers = len(self.prompts), self.shape.layers
        judged = Judged(candidate, names, np.zeros((prompts, len(names), layers)), np.zeros((prompts, layers)))
        for number, (prompt, answers) in enumerate(zip(self.prompts, said, strict=True)):
            near = nearest(answers, (prompt.tokens, layers, self.shape.experts))
            judged.sums[number], judged.made[number] = count(near, prompt.experts, self.shape)
            for lead, ranks in _leads(answers):
                sums, made = count(ranks, prompt.experts, self.shape)
                table = judged.by_lead.setdefault(lead, np.zeros((prompts, len(names) + 1)))
                table[number] += [*sums.sum(axis=1), made.sum()]
            for cell in self.cells:
                table = judged.covered.setdefault(cell, np.zeros((prompts, 3, layers)))
                table[number] = covered(near, prompt.experts, self._held(cell)[number], self.reads)
        return judged

    def _held(self, cell: Cell) -> list[NDArray[np.bool_]]:
        if cell not in self._residents:
            found = residents(self.prompts, self.shape, cell[0], self.slots[cell[1]], self.worths)
            for prompt in found:
                prompt[:1, 0] = True  # nothing of a decode step comes before it: nobody can predict it, nobody must
            self._residents[cell] = found
        return self._residents[cell]

    def _simulate(self, judged: Judged, said: Sequence[Sequence[Answers]], cell: Cell) -> None:
        policy, share = cell
        plan = Plan(policy, self.slots[share], self.reads, self.settings.far_share)
        simulation = Simulation(self.shape, self.settings.device, plan, self._keys, self._future)
        stalls = []
        for number, (prompt, answers) in enumerate(zip(self.prompts[: self.simulated], said, strict=False)):
            worths = None if self.worths is None else self.worths[number]
            simulation.prompt(prompt.experts, [one.forecast for one in answers], worths)
            stalls.append(simulation.result().stall_s)
        judged.sims[cell] = simulation.result()
        judged.stalls[cell] = np.diff([0.0, *stalls])

    def _routers(self) -> tuple[Any, str]:
        ids = next((prompt.prefill_ids for prompt in self.prompts if len(prompt.prefill_ids)), None)
        ids = self.prompts[0].token_id if ids is None else ids
        name = self.settings.model or self.held.model.name
        try:
            return open_routers(name, self.held.model.fingerprint, ids[:8].tolist()), ""
        except CheckpointError as error:
            if self.settings.model is not None:
                raise
            return None, str(error)


def nearest(answers: Sequence[Answers], shape: tuple[int, ...]) -> NDArray[np.int16]:
    """Of all that was said about a layer of a token, the ranking with the smallest lead, [T, L, E]."""
    out = np.full(shape, NOTHING, np.int16)
    for _, ranks in sorted(_leads(answers), key=lambda item: -item[0]):
        out = np.where(ranks[:, :, :1] != NOTHING, ranks, out)
    return out


def _leads(answers: Sequence[Answers]) -> list[tuple[int, NDArray[np.int16]]]:
    return [(lead, ranks) for one in answers for lead, ranks in one.ranks.items()]


def _facts(predictors: Sequence[Predictor]) -> dict[str, Any]:
    return {
        "moment": "+".join(predictor.moment.value for predictor in predictors),
        "signal": "+".join(predictor.signal for predictor in predictors),
        "source": "+".join(filter(None, (str(getattr(predictor, "source", "")) for predictor in predictors))),
        "lookahead": max(predictor.lookahead for predictor in predictors),
    }
