"""Runtimes that may change outputs, each with a measure of how far it departed. Only where ``RunConfig.lossy`` is set.

Shapes: T tokens, k experts chosen, E experts, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foregate.checkpoint.locate import locate
from foregate.checkpoint.opening import Checkpoint, open_checkpoint
from foregate.engine.deviation import Deviation, PartsLeftOut, PartsLow, PredictedLayers
from foregate.engine.following import Following
from foregate.engine.runtime import ExpertRuntime
from foregate.engine.weighing import Floats, Weigher
from foregate.errors import ConfigError
from foregate.experts.compute import check_supported
from foregate.experts.paired_transfer import PairedTransfer
from foregate.experts.readers import AnyTransfer, open_transfer
from foregate.experts.slots import SlotPool
from foregate.experts.store import PackedStore
from foregate.interfaces import Predictor, Signals
from foregate.native.decoder_layer import DecoderLayer
from foregate.prefetch.lossy import LossyPipeline, LowPrecisionPipeline, SkippingPipeline
from foregate.prefetch.pipeline import Pipeline
from foregate.types import ExpertKey, ExpertLayout, Moment, Phase, Prediction, PredictorCost, RoutingStep

log = logging.getLogger("foregate")

_ROWS = 4
"""Last tokens of a prompt, of every layer, from which the rule of the weights is learned."""


class _Lossy(ExpertRuntime):
    """What computes something else than it is told does so in ``forward`` alone."""

    _computes_less = True

    def forward_one(self, layer: int, module: nn.Module, kernel: DecoderLayer, then: Following) -> None:
        choice = kernel.choice
        self._signals.chosen(layer, (choice.logits, choice.weights, choice.index))
        kernel.take(self.forward(layer, module, kernel.routed, choice.index, choice.weights))
        then()


class PredictedRuntime(_Lossy):
    """Runs what was predicted, with predicted weights; the router's own choice is only counted, never fetched.

    The first layer, a layer that nothing was predicted for, and prompts run exactly. Where the predictor's scores are
    not on the router's scale, the layer's own router weighs the predicted experts.
    """

    def __init__(self, *, predictor: Predictor, **parts: Any) -> None:
        self._planned: dict[int, Prediction] = {}
        super().__init__(predictor=_Remembering(predictor, self._planned), **parts)
        self.deviation = PredictedLayers()
        self._scaled = bool(getattr(predictor, "router_scores", False))
        self._weigher = Weigher(self._signals.family)
        self._executed: RoutingStep | None = None
        self._gave_up = False

    def begin_prefill(self) -> None:
        super().begin_prefill()
        self._planned.clear()

    def end_prefill(self) -> None:
        """Raises ConfigError where this family's weights cannot be made from scores."""
        super().end_prefill()
        if self._signals.distrust:
            raise ConfigError(f"lossy execute-predicted: {self._signals.distrust}")
        if not self._weigher.rule:
            self._weigher.settle()

    def begin_decode(self, position: int, token_id: int) -> None:
        self._planned.clear()
        super().begin_decode(position, token_id)

    def give_up_predicting(self, reason: str) -> None:
        if not self._gave_up:
            log.warning("every layer runs exactly from now on: %s", reason)
        self._gave_up = True
        super().give_up_predicting(reason)

    def forward(self, layer: int, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """As the exact one, of the predicted experts."""
        if self.phase is Phase.PREFILL or len(index) != 1:
            if self.phase is Phase.PREFILL and not self._weigher.rule and not self._signals.distrust:
                self._learn(layer, index, weights)
            return super().forward(layer, module, x, index, weights)
        executed = self._execution(layer, index, weights)
        self.deviation.count(index, weights, None if executed is None else executed[0])
        if executed is None:
            return super().forward(layer, module, x, index, weights)
        self._executed = _step(layer, self.phase, self.position, *executed)
        self._route(layer, index, weights)
        self._executed = None
        return self._gather(layer, module, x, *executed)

    def _observe(self, step: RoutingStep) -> None:
        """The predictor is told what runs: that is what later layers are fed with."""
        super()._observe(self._executed or step)

    def _execution(self, layer: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        """Experts and weights [1, k] to run instead of the router's; None where the layer runs exactly."""
        planned = self._planned.pop(layer, None)
        if planned is None or layer == 0:
            return None
        chosen, scores = _best(planned, self._experts[layer], index.shape[1])
        if len(chosen) < index.shape[1]:
            return None
        if not self._scaled:
            if set(chosen.tolist()) == set(index[0].tolist()):
                return index, weights
            scores = self._signals.scores(layer, self._signals.hidden("router_input"))
        made = torch.from_numpy(self._weigher.weigh(scores, chosen)).to(weights.dtype)
        return torch.from_numpy(chosen)[None].to(index.dtype), made[None]

    def _learn(self, layer: int, index: Tensor, weights: Tensor) -> None:
        rows = min(_ROWS, len(index))
        for scores, chosen, given in zip(
            self._signals.last_scores(layer, rows),
            index[-rows:].numpy().astype(np.int64),
            weights[-rows:].float().numpy(),
            strict=True,
        ):
            if ((chosen >= 0) & (chosen < len(scores))).all():
                self._weigher.see(scores, chosen, given)

    def _predict(self, layer: int, moment: Moment) -> None:
        if self._prefetcher.wanted:
            super()._predict(layer, moment)
        elif self.predictor.moment is moment and self.phase is Phase.DECODE and not self._gave_up:
            self._ask_alone(layer, moment)

    def _ask_alone(self, layer: int, moment: Moment) -> None:
        """Nothing is to be read ahead, but the layers will run what is predicted."""
        began = perf_counter()
        self._signals.layer, self._signals.moment = layer, moment
        try:
            self.predictor.predict(self._signals)
        except Exception as error:  # as where it reads ahead
            self.give_up_predicting(f"predictor {self.predictor.name!r} failed: {type(error).__name__}: {error}")
        self._prefetcher.stats.predict_s += perf_counter() - began


class SkippingRuntime(_Lossy):
    """Leaves out what has not arrived; the weights of the others grow to the same sum. All late: nothing is added."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.deviation = PartsLeftOut()
        self._lossy = cast(LossyPipeline, self._pipeline)

    def begin_prefill(self) -> None:
        self._lossy.lossy = False
        super().begin_prefill()

    def begin_decode(self, position: int, token_id: int) -> None:
        self._lossy.lossy = True
        super().begin_decode(position, token_id)

    def finish(self) -> None:
        super().finish()
        self._lossy.settle()

    def forward(self, layer: int, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """As the exact one, without what is late."""
        out = super().forward(layer, module, x, index, weights)
        if self.phase is Phase.PREFILL:
            return out
        gone = self.deviation.count(index, weights, self._lossy.affected)
        if not self._lossy.affected:
            return out
        total = weights.float().sum(dim=1)
        left = total - gone
        scale = torch.where(left > 0, total / left.clamp_min(1e-20), torch.zeros_like(total))
        return (out.float() * scale[:, None]).to(out.dtype)


class LowPrecisionRuntime(_Lossy):
    """Computes misses in low precision; which weights lie in a slot is for ``layout_of``."""

    def __init__(self, *, layout_of: Callable[[ExpertKey], ExpertLayout], low: Checkpoint, **parts: Any) -> None:
        pipeline: LowPrecisionPipeline = parts["pipeline"]

        def either(key: ExpertKey) -> ExpertLayout:
            return low.layout_of(key) if key in pipeline.low else layout_of(key)

        super().__init__(layout_of=either, **parts)
        self.deviation = PartsLow()
        self._exact_of = layout_of
        self._low_of = low.layout_of
        self._lossy = pipeline

    def begin_prefill(self) -> None:
        self._lossy.lossy = False
        super().begin_prefill()

    def begin_decode(self, position: int, token_id: int) -> None:
        self._lossy.lossy = True
        super().begin_decode(position, token_id)

    def forward(self, layer: int, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """As the exact one, on what its pipeline reads."""
        out = super().forward(layer, module, x, index, weights)
        if self.phase is Phase.DECODE:
            coarse = self._lossy.affected
            keys = [ExpertKey(layer, expert) for expert in coarse]
            saved = sum(self._exact_of(key).nbytes - self._low_of(key).nbytes for key in keys)
            self.deviation.count(index, weights, coarse, saved)
        return out


LossyRuntime = PredictedRuntime | SkippingRuntime | LowPrecisionRuntime


@dataclass(frozen=True, slots=True)
class Mode:
    """Which loop and which runtime a mode is made of."""

    pipeline: Callable[..., Pipeline]
    runtime: Callable[..., ExpertRuntime]


MODES = {
    None: Mode(Pipeline, ExpertRuntime),
    "execute-predicted": Mode(Pipeline, PredictedRuntime),
    "skip-late": Mode(SkippingPipeline, SkippingRuntime),
    "low-precision-miss": Mode(LowPrecisionPipeline, LowPrecisionRuntime),
}


def deviation_of(runtime: ExpertRuntime) -> Deviation | None:
    """How far ``runtime`` has departed from the exact one; None where it is the exact one."""
    return runtime.deviation if isinstance(runtime, LossyRuntime) else None


def check_family(modules: Sequence[nn.Module], mode: str, family: str) -> None:
    """Raises ConfigError for a family whose experts are not called through transformers' interface."""
    if not all(hasattr(module, "_is_expert_parallel") for module in modules):
        raise ConfigError(f"lossy {mode}: {family} weighs experts outside transformers' experts interface")


class LowPack:
    """The smaller pack of low-precision-miss. Raises ConfigError unless it holds the same model's experts, smaller."""

    def __init__(self, name: str, exact: Checkpoint, modules: Sequence[nn.Module]) -> None:
        self.checkpoint = low = open_checkpoint(locate(name))
        if not low.packed:
            raise ConfigError(f"low-precision pack {name} is no pack: make one with foregate pack --dtype int4")
        if low.fingerprint != exact.fingerprint:
            raise ConfigError(f"low-precision pack {name} was made from another model than {exact.directory}")
        if low.spec.expert_slot_bytes >= exact.spec.expert_slot_bytes:
            sizes = f"{low.spec.expert_slot_bytes:,} bytes an expert, against {exact.spec.expert_slot_bytes:,}"
            raise ConfigError(f"low-precision pack {name} is not smaller than the model: {sizes}")
        for module, layout in zip(modules, low.layouts, strict=True):
            check_supported(module, layout, low.spec.model_type)

    def join(self, exact: AnyTransfer, pool: SlotPool, *, threads: int, timeout_s: float) -> PairedTransfer:
        """A transfer that reads both; closing it closes the pack as well."""
        store = PackedStore(self.checkpoint)
        return PairedTransfer(exact, open_transfer(store, pool, threads=threads, timeout_s=timeout_s), store.close)


class _Remembering:
    """A predictor whose last words on every layer of this token are kept in ``planned``."""

    def __init__(self, inner: Predictor, planned: dict[int, Prediction]) -> None:
        self.name, self.signal, self.moment = inner.name, inner.signal, inner.moment
        self.lookahead, self.asks_routers = inner.lookahead, inner.asks_routers
        self.advise = getattr(inner, "advise", None)
        self._inner = inner
        self._planned = planned

    def cost(self) -> PredictorCost:
        return self._inner.cost()

    def reset(self) -> None:
        self._inner.reset()

    def observe(self, step: RoutingStep) -> None:
        self._inner.observe(step)

    def predict(self, signals: Signals) -> Sequence[Prediction]:
        made = self._inner.predict(signals)
        self._planned.update({p.layer: p for p in made if p.layer < signals.layers})
        return made


def _best(planned: Prediction, experts: int, k: int) -> tuple[NDArray[np.int64], Floats]:
    """The first ``k`` real experts of ``planned``, and all of its scores by expert [E] (-inf: not named)."""
    scores = np.full(experts, -np.inf, np.float32)
    chosen: list[int] = []
    for expert, score in zip(planned.experts, planned.scores, strict=False):
        if isinstance(expert, (int, np.integer)) and 0 <= expert < experts and expert not in chosen[:k]:
            scores[expert] = score
            chosen.append(int(expert))
    return np.asarray(chosen[:k], np.int64), scores


def _step(layer: int, phase: Phase, position: int, index: Tensor, weights: Tensor) -> RoutingStep:
    return RoutingStep(
        layer, phase, position, index.numpy().astype(np.int64), weights.float().numpy().astype(np.float32)
    )
