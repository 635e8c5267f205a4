"""Later routers asked ahead, on what this layer knows. Believed only where replaying a router gives what it chose.

Shapes: T tokens, E experts, k chosen, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foregate.checkpoint.anatomy import FlowWatcher, MoeAnatomy
from foregate.engine.norms import native_norm
from foregate.engine.plain_gate import PlainGate, order
from foregate.errors import ConfigError
from foregate.interfaces import Shift
from foregate.native.decoder_layer import DecoderLayer
from foregate.native.kernels import Ranker
from foregate.native.matrix import BF16, F32
from foregate.types import Moment, Prediction, RoutingStep

Ranking = tuple[NDArray[np.int64], NDArray[np.float32]]

KEPT_ROWS = 16
"""Tokens of a prompt whose hidden states outlive their layer."""

_FORMATS = {torch.bfloat16: BF16, torch.float32: F32}

FEATURES = ("pre_attention", "residual", "router_input")


class ModelSignals:
    """Implements ``interfaces.Signals`` over a live model. ``close`` removes every hook.

    ``distrust`` is empty, or says why routers of this model cannot be asked ahead. ``reached`` is called before the
    mixer of every MoE layer and before its choice is told; ``layer`` and ``moment`` say then where the pass is.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], experts: Sequence[int], top_k: int, family: str) -> None:
        self.layer = 0
        self.moment = Moment.BEFORE_ATTENTION
        self.layers = len(paths)
        self.top_k = top_k
        self.experts = tuple(experts)
        self.position = 0
        self.token_id = -1
        self.distrust = ""
        self.reached: Callable[[int, Moment], None] = lambda layer, moment: None
        self.early, self.late = True, True
        """Whether ``reached`` must be called before the mixer, and before the choice, in a decode step."""
        self.told: tuple[RoutingStep, tuple[int, int]] | None = None
        """What was told last, and where the same numbers lie, if anywhere."""
        self.family = family
        self._dtype = next(model.parameters()).dtype
        self._format = _FORMATS.get(self._dtype)
        self._flow = FlowWatcher(model, paths, experts, self._at)
        self._plain = [PlainGate(part.router, part.experts) for part in self._flow.parts]
        self._rankers: dict[tuple[int, bool], Ranker | None] = {}
        self._quick: dict[tuple[int, int, str], tuple[DecoderLayer, tuple[Ranker, int] | None]] = {}
        self._outputs: list[Any] = [None] * self.layers
        self._listening: list[Any] = []
        self._unexplained: set[int] = set()

    @property
    def parts(self) -> Sequence[MoeAnatomy]:
        """The parts of every MoE layer."""
        return self._flow.parts

    def close(self) -> None:
        """Remove every hook; the model is as it was."""
        self.listen(on=False)
        self._flow.close()

    def listen(self, *, on: bool) -> None:
        """Whether to keep what routers give, for ``routed``."""
        for handle in self._listening:
            handle.remove()
        routers = enumerate(part.router for part in self._flow.parts) if on else ()
        self._listening = [r.register_forward_hook(self._keep(n)) for n, r in routers if r is not None]
        self._outputs = [None] * self.layers

    # What hooks see, told by a layer that is computed without its modules

    def every_way(self) -> Iterator[None]:
        """``early`` and ``late`` as a decode step may find them, one after the other."""
        for told in (False, True):
            self.early = self.late = told
            yield

    def hooks(self, layer: int) -> int:
        """How many hooks on parts of ``layer`` are these signals' own; -1 while they learn."""
        return -1 if self._flow.learning else self._flow.hooks(layer) + bool(self._listening)

    def hooked(self, layer: int) -> list[dict[int, Any]]:
        """Where those are kept, among others' if there are any."""
        part = self._flow.parts[layer]
        parts = [part.mixer, part.router, *part.decoder.children()]
        kept = [module._forward_pre_hooks for module in parts if module is not None]
        return kept if part.router is None else [*kept, part.router._forward_hooks]

    def before_attention(self, layer: int, normed: Tensor) -> None:
        """The input [1, D] of the mixer of ``layer`` is there."""
        self._flow.parts[layer].pre_attention = normed
        self._at(layer, Moment.BEFORE_ATTENTION)

    def after_attention(self, layer: int, kernel: DecoderLayer) -> None:
        """``kernel`` has computed ``layer`` up to its experts, and nobody knows yet what its router chose."""
        part = self._flow.parts[layer]
        if part.compiled is not kernel:
            part.pre_attention, part.residual, part.router_input = kernel.normed, kernel.residual, kernel.routed
            part.compiled = kernel
        self.layer, self.moment = layer, Moment.AFTER_ATTENTION
        if self.late:
            self.reached(layer, Moment.AFTER_ATTENTION)

    def chosen(self, layer: int, output: Any) -> None:
        """What the router of ``layer`` gave."""
        if self._listening:
            self._outputs[layer] = output

    def _keep(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def after(router: nn.Module, args: Any, output: Any) -> None:
            self._outputs[layer] = output

        return after

    def routed(self, step: RoutingStep, given: NDArray[np.float32] | None = None) -> NDArray[np.float32] | None:
        """Scores [T, E] that this layer's router has just given; None where it gives none that explain its choice.

        ``given``: they are at hand, until this layer is called for the next token (it may be before this one is shown).
        """
        if given is not None:
            return None if step.layer in self._unexplained else given
        output, experts = self._outputs[step.layer], self.experts[step.layer]
        self._outputs[step.layer] = None
        scored = [t for t in _tensors(output) if t.is_floating_point() and t.shape[-1] >= experts]
        if step.layer in self._unexplained or not scored:
            return None
        scores = _numbers(scored[-1], experts)
        if len(scores) != len(step.experts) or (self._flow.learning and not _explain(scores, step.experts)):
            self._unexplained.add(step.layer)
            return None
        return scores

    def hidden(self, name: str) -> NDArray[np.float32]:
        """See ``interfaces.Signals``."""
        return _floats(self._known(name))

    def addresses(self, *names: str, numbers: int) -> tuple[tuple[int, ...], int] | None:
        """See ``interfaces.Signals``."""
        kernel: DecoderLayer | None = self._flow.parts[self.layer].compiled
        # Before attention the rest is the last token's.
        there = self.moment is not Moment.BEFORE_ATTENTION or names == ("pre_attention",)
        if kernel is not None and there and numbers <= kernel.width:
            placed = kernel.placed(names)
            if placed is not None:
                return placed
        dtype, found = self._dtype, []
        for name in names:
            value = self._known(name)
            if value.dtype is not dtype or value.shape[-1] < numbers or not value.is_contiguous():
                return None
            found.append(value.data_ptr())
        return (tuple(found), self._format) if self._format is not None else None

    def choice_of(self, step: RoutingStep) -> tuple[int, int] | None:
        """See ``interfaces.Signals``."""
        return self.told[1] if self.told is not None and self.told[0] is step else None

    def normed(self, target: int, residual: NDArray[np.float32]) -> NDArray[np.float32]:
        """See ``interfaces.Signals``."""
        return _floats(self._norm(target, self._tensor(residual)))

    def scores(self, target: int, router_input: NDArray[np.float32]) -> NDArray[np.float32]:
        """See ``interfaces.Signals``."""
        self._check_trust()
        there, plain, x = self._flow.parts[target], self._plain[target], self._tensor(router_input)
        if plain.trusted:
            logits: NDArray[np.float32] = plain.logits(x).float().numpy()
            return logits
        return _scores(_route(there, x), there.experts)

    def last_scores(self, layer: int, rows: int) -> list[NDArray[np.float32]]:
        """``scores`` that the router of ``layer`` gave for each of the last ``rows`` tokens of its last input."""
        given = self._flow.parts[layer].router_input
        if given is None:
            return []
        return [self.scores(layer, row) for row in given[-rows:].float().numpy()]

    def rank(self, target: int, source: str) -> Ranking:
        """See ``interfaces.Signals``; of the last token of the pass."""
        self._check_trust()
        source = self.fed_with(self.layer, target, source)
        return self._rank(target, source, self._known(source))

    def best(self, target: int, source: str, most: int | None) -> Prediction:
        """See ``interfaces.Signals``."""
        asked = self._asked(target, source)
        found = None if asked is None else asked[0].best(target, asked[1], asked[0].rows if most is None else most)
        return self._first(target, source, most) if found is None else found

    def begin_best(self, target: int, source: str, most: int | None) -> Callable[[], Prediction]:
        """See ``interfaces.Signals``."""
        asked = self._asked(target, source)
        if asked is None:
            return partial(self._first, target, source, most)
        end = asked[0].begin(target, asked[1], asked[0].rows if most is None else most)
        return lambda: end() or self._first(target, source, most)

    def begin_shifted(self, target: int, shift: Shift, most: int) -> Callable[[], Prediction | None] | None:
        """See ``interfaces.Signals``."""
        asked = self._asked(target, "residual")
        if asked is None or not asked[0].normed:
            return None
        return asked[0].begin(target, asked[1], most, shift.place(self.layer), shift)

    def _first(self, target: int, source: str, most: int | None) -> Prediction:
        experts, scores = self.rank(target, source)
        return Prediction(target, tuple(experts[:most].tolist()), tuple(scores[:most].tolist()))

    def _asked(self, target: int, source: str) -> tuple[Ranker, int] | None:
        """Who ranks ``target`` on ``source`` in one call, and where that lies; None where nobody does."""
        kernel: DecoderLayer | None = self._flow.parts[self.layer].compiled
        if kernel is None or (self.moment is Moment.BEFORE_ATTENTION and source != "pre_attention"):
            return None
        key = self.layer, target, source
        known = self._quick.get(key)
        if known is not None and known[0] is kernel:
            return known[1]
        if self._flow.learning or self.distrust or not self._plain[target].trusted:
            return None
        fed = self.fed_with(self.layer, target, source)
        ranker = self._ranker(target, fed == "residual")
        fits = ranker is not None and ranker.width == kernel.width and fed in kernel.places
        found = (ranker, kernel.places[fed]) if ranker is not None and fits else None
        self._quick[key] = kernel, found
        return found

    def rank_row(self, target: int, source: str, row: NDArray[np.float32]) -> Ranking:
        """What ``rank`` would give if ``source`` of this layer were ``row`` [D]; see ``fed_with``."""
        self._check_trust()
        return self._rank(target, source, self._tensor(row))

    def _rank(self, target: int, source: str, value: Tensor) -> Ranking:
        there, plain, normed = self._flow.parts[target], self._plain[target], source == "residual"
        ranker = self._ranker(target, normed) if plain.trusted else None
        ranked = None if ranker is None else ranker(value)
        if ranked is not None:
            return ranked
        if normed:
            value = self._norm(target, value)
        if plain.trusted:
            return order(plain.logits(value), self.top_k)
        return _ranking(_route(there, value), there.experts)

    def _ranker(self, target: int, normed: bool) -> Ranker | None:
        """Norm, router and order of ``target`` in one call; None where one of them is not the kernels'."""
        key = target, normed
        if key not in self._rankers:
            norm = self._flow.parts[target].norm if normed else None
            native = None if norm is None else native_norm(norm)
            suits = norm is None or native is not None
            self._rankers[key] = self._plain[target].ranker(native, self.top_k) if suits else None
        return self._rankers[key]

    def fed_with(self, layer: int, target: int, source: str) -> str:
        """What ``rank`` at ``layer`` really feeds to the router of ``target``: without a norm, a router input."""
        here, there = self._flow.parts[layer], self._flow.parts[target]
        missing = source == "residual" and (here.residual is None or there.norm is None)
        return "router_input" if missing else source

    def rank_rows(self, target: int, source: str, rows: NDArray[np.float32]) -> Ranking:
        """What ``rank`` gives for each of ``rows`` [T, D] of signal ``source``, up to rounding, both [T, E]."""
        self._check_trust()
        there = self._flow.parts[target]
        value = torch.from_numpy(np.ascontiguousarray(rows, np.float32)).to(self._dtype)
        return _rankings(_route(there, self._norm(target, value) if source == "residual" else value), there.experts)

    def _at(self, layer: int, moment: Moment) -> None:
        self.layer, self.moment = layer, moment
        self.reached(layer, moment)

    def _check_trust(self) -> None:
        if self.distrust:
            raise ConfigError(self.distrust)

    def _known(self, name: str) -> Tensor:
        """Feature ``name`` of this layer's last token, [1, D]."""
        if name not in FEATURES:
            raise ConfigError(f"unknown signal {name!r}; choose from: {', '.join(FEATURES)}")
        value: Tensor | None = getattr(self._flow.parts[self.layer], name)
        # Before attention the parts still hold the last token's residual and router input.
        if value is None or (self.moment is Moment.BEFORE_ATTENTION and name != "pre_attention"):
            raise ConfigError(f"{self.family}: MoE layer {self.layer} has no {name} {self.moment.value}")
        return value if len(value) == 1 else value[-1:]

    def _norm(self, target: int, residual: Tensor) -> Tensor:
        norm = self._flow.parts[target].norm
        # .forward, not the call: hooks of ours and of tracers must not see a probe.
        return residual if norm is None else norm.forward(residual)

    def _tensor(self, value: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(value, np.float32))[None].to(self._dtype)

    def router_output(self, layer: int) -> Any:
        """Output of the router of ``layer`` for all tokens, recomputed from its last input."""
        part = self._flow.parts[layer]
        assert part.router_input is not None
        return _route(part, part.router_input)

    def on_route(self, step: RoutingStep) -> None:
        """In the first pass: check that a replayed router chooses what the model chose. Until it is clear: whether its
        matrix alone does."""
        if self._flow.learning and not self.distrust:
            self.distrust = self._mismatch(step)
        plain = self._plain[step.layer]
        if plain.open:
            given = self._flow.parts[step.layer].router_input
            if given is not None and len(given) == len(step.experts):
                plain.see(given, step.experts)

    def forget_all_but_last(self, layer: int) -> None:
        """A chunk of a prompt has passed ``layer``: of its hidden states only the last rows are ever asked for. All of
        them would be three activations a layer, 96 MB for 512 tokens of 16 layers of 2,048."""
        part = self._flow.parts[layer]
        for name in FEATURES:
            value: Tensor | None = getattr(part, name)
            if value is not None and len(value) > KEPT_ROWS:
                setattr(part, name, value[-KEPT_ROWS:].clone())

    def stop_learning(self) -> None:
        """After the first pass."""
        if self._flow.learning:
            self._flow.stop_learning()

    def _mismatch(self, step: RoutingStep) -> str:
        part = self._flow.parts[step.layer]
        place = f"{self.family}: MoE layer {step.layer}"
        if part.router is None or part.router_input is None:
            return f"{place} has no router module that can be asked ahead"
        try:
            ranked, _ = _ranking(_route(part, part.router_input[-1:]), part.experts)
        except Exception as error:  # a stranger's module, called in a way that it may not foresee
            return f"{place}: its router cannot be asked ahead ({type(error).__name__}: {error})"
        chosen = {e for e in step.experts[-1].tolist() if 0 <= e < part.experts}
        return (
            "" if chosen == set(ranked[: len(chosen)].tolist()) else f"{place}: its router does not repeat its choice"
        )


def _route(part: MoeAnatomy, x: Tensor) -> Any:
    assert part.router is not None
    args, kwargs = part.router_extra
    return part.router.forward(x.view((1,) * (part.router_dim - 2) + x.shape), *args, **kwargs)


def _floats(x: Tensor) -> NDArray[np.float32]:
    """The last row of ``x`` [T, D] as [D]."""
    last = x if len(x) == 1 else x[-1:]
    # A copy in any case: strangers may write to what they are told.
    row: NDArray[np.float32] = last.to(torch.float32, copy=True).numpy()[0]
    return row


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in (output if isinstance(output, (tuple, list)) else (output,)) if isinstance(t, Tensor)]


def _scores(output: Any, experts: int) -> NDArray[np.float32]:
    """Scores of all experts for the last token, whatever the form of a router's output."""
    row: NDArray[np.float32] = _all_scores(output, experts)[-1]
    return row


def _all_scores(output: Any, experts: int) -> NDArray[np.float32]:
    """Scores [T, E] of every token."""
    scored = [t for t in _tensors(output) if t.is_floating_point() and t.shape[-1] >= experts]
    # Llama 4 returns scores (zero where not chosen) before logits: the last is the one that ranks them all.
    return _numbers(scored[-1], experts)


def _numbers(scored: Tensor, experts: int) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = scored.reshape(-1, scored.shape[-1]).float().numpy()[:, :experts]
    return rows


def _explain(scores: NDArray[np.float32], chosen: NDArray[np.int64]) -> bool:
    """Whether the chosen score above average, [T, E] and [T, k]: hints need no more, and routers may add a bias."""
    real = np.where((chosen >= 0) & (chosen < scores.shape[1]), chosen, 0)
    return bool(np.take_along_axis(scores, real, axis=1).mean() > scores.mean())


def _ranking(output: Any, experts: int) -> Ranking:
    """Best-first experts of a router's output: the chosen first, the rest by their scores."""
    chosen = [t for t in _tensors(output) if not t.is_floating_point()]
    scores = _scores(output, experts)
    order = np.argsort(-scores, kind="stable")
    if chosen:
        first = chosen[-1].reshape(-1, chosen[-1].shape[-1])[-1].numpy()
        first = first[(first >= 0) & (first < experts)]
        others = np.ones(experts, dtype=bool)
        others[first] = False
        order = np.concatenate([first, order[others[order]]])
    return order.astype(np.int64), scores[order].astype(np.float32)


def _rankings(output: Any, experts: int) -> Ranking:
    """``_ranking`` of every token, both [T, E]."""
    chosen = [t for t in _tensors(output) if not t.is_floating_point()]
    scores = _all_scores(output, experts)
    key = -scores
    if chosen:
        first = chosen[-1].reshape(len(scores), -1).numpy().astype(np.int64)
        valid = (first >= 0) & (first < experts)
        places = np.broadcast_to(np.arange(first.shape[1]) - first.shape[1], first.shape)
        row, column = np.nonzero(valid)
        # Before every score, in the order of the choice.
        key = np.argsort(np.argsort(key, axis=1, kind="stable"), axis=1).astype(np.float32)
        key[row, first[row, column]] = places[row, column]
    order = np.argsort(key, axis=1, kind="stable")
    return order.astype(np.int64), np.take_along_axis(scores, order, axis=1)
