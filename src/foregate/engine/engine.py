"""The composition root: one place that knows every part, and the generation loop over them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from time import perf_counter, perf_counter_ns
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foregate.checkpoint.locate import locate
from foregate.checkpoint.opening import Checkpoint, open_checkpoint
from foregate.checkpoint.origin import original_fingerprint
from foregate.checkpoint.readplan import CHUNK_BYTES
from foregate.config import DEFAULT_READERS, RunConfig, SamplingConfig, parse_prefetch, parse_readers
from foregate.engine.chunks import READ_WHOLE, chunk_bounds
from foregate.engine.decode_step import DecodeStep
from foregate.engine.decoder_layer import DecoderLayers
from foregate.engine.dense import DenseKernels
from foregate.engine.deviation import Deviation
from foregate.engine.experts_interface import install, uninstall
from foregate.engine.kv_room import make_room
from foregate.engine.lossy import MODES, LowPack, check_family, deviation_of
from foregate.engine.memory import SlotPlan, Staging, keep_few_products, overhead, plan_slots, plan_staging
from foregate.engine.meter import Meter
from foregate.engine.model import load_model, load_tokenizer, stop_ids, takes_logits_to_keep
from foregate.engine.report import RunReport
from foregate.engine.reporter import Reporter
from foregate.engine.sampler import Sampler
from foregate.engine.signals import ModelSignals
from foregate.engine.text import Detokenizer, check_length, encode
from foregate.errors import ConfigError, ForegateError, IntegrityError, PromptError
from foregate.events import EventHub, EventListener, PassBegan
from foregate.experts.cache import ExpertCache
from foregate.experts.compute import SlotViews, check_supported
from foregate.experts.paired_transfer import PairedTransfer
from foregate.experts.policy import POLICIES
from foregate.experts.readers import AnyTransfer, choose, open_transfer
from foregate.experts.slots import SlotPool
from foregate.experts.store import open_store
from foregate.interfaces import ExpertStore, Predictor, RoutingObserver
from foregate.predictors import PREDICTORS, choice
from foregate.predictors.file import ModelIdentity
from foregate.predictors.oracle import Oracle, RouteRecorder
from foregate.prefetch.controller import Controller
from foregate.prefetch.prefetcher import Prefetcher, depth
from foregate.types import FinishReason, GenerationStep, Phase


class Engine:
    """A model whose experts live on disk, ready to generate. One sequence at a time; not thread-safe.

    ``wrap_store`` lets tests put a fault-injecting store around the real one.
    """

    def __init__(self, config: RunConfig, *, wrap_store: Callable[[ExpertStore], ExpertStore] | None = None) -> None:
        began = perf_counter()
        keep_few_products()
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.events = EventHub()
        self.checkpoint: Checkpoint = open_checkpoint(locate(config.model))
        self.spec = self.checkpoint.spec
        self._check_config(config)
        self.plan = self._plan()
        self.tokenizer = load_tokenizer(self.checkpoint.directory)
        self.model = load_model(self.checkpoint)
        self._keeps_logits = takes_logits_to_keep(type(self.model))
        store = open_store(self.checkpoint)
        self.store = wrap_store(store) if wrap_store else store
        try:
            self._attach()
            self._build()
        except BaseException:
            self.store.close()
            raise
        self.load_s = perf_counter() - began
        self.report: RunReport | None = None
        self._runs = 0
        self._failed = ""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def context(self) -> int:
        """Most tokens of a sequence, prompt included."""
        return self.spec.context_length or 2**31

    @property
    def overhead_bytes(self) -> int:
        """Memory beside budget, dense weights and KV cache."""
        wanted = parse_readers(self.config.reader_threads)
        return overhead(
            slot_bytes=self.spec.expert_slot_bytes,
            readers=DEFAULT_READERS if wanted is None else wanted,
            packed=self.checkpoint.packed,
        )

    @property
    def observers(self) -> list[RoutingObserver]:
        """Told of every routing decision; append to listen."""
        return self.runtime.observers

    def listen(self, listener: EventListener) -> Callable[[], None]:
        """Tell ``listener`` of every event, on the thread that generates; the function returned ends that."""
        self.events.add(listener)
        return lambda: self.events.remove(listener)

    def encode(self, prompt: str, template: str = "auto") -> list[int]:
        """Token ids of ``prompt``. Raises PromptError (empty, too long)."""
        return encode(self.tokenizer, prompt, template=template, context=self.context)

    def reset(self, **changes: Any) -> None:
        """Cold again, with other settings: any field of RunConfig but ``model`` and ``threads``. The weights stay.

        Raises ConfigError, or BudgetError, for a setting that cannot be honoured, TransferError or IntegrityError where
        a read fails or hangs; then the engine has failed.
        """
        fixed = {"model", "threads"} & set(changes)
        if fixed:
            raise ConfigError(f"{', '.join(sorted(fixed))} cannot change in an engine that runs")
        listeners = self.runtime.observers
        with self._guarded():
            self.runtime.finish()
            self.transfer.close()
            self.prefetcher.settle()
            self.cache.clear()
            self.config = replace(self.config, **changes)
            self._check_config(self.config)
            plan, before = self._plan(), self.plan
            self.plan = plan
            self._build(None if plan.slots != before.slots else self.pool)
            # The old pool hangs in cycles of the old parts; two pools at once would break the budget.
            gc.collect()
        self.runtime.observers = listeners
        self._runs = 0

    def stream(self, prompt_ids: list[int], sampling: SamplingConfig | None = None) -> Generator[GenerationStep]:
        """Generate token by token. Raises PromptError, TransferError; ``report`` holds the figures afterwards."""
        sampling = sampling or SamplingConfig()
        self._check(prompt_ids)
        if isinstance(self.predictor, Oracle) and not self.predictor.knows((tuple(prompt_ids), sampling)):
            self._record(self.predictor, prompt_ids, sampling)
        yield from self._run(prompt_ids, sampling)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        """Logits [T, V] of ``ids``, read as a prompt."""
        self._check(ids)
        with self._guarded():
            self.runtime.begin_prefill()
            parts = [out.logits[0] for out in self._chunks(ids, keep=0)]
            self.runtime.end_prefill()
        return torch.cat(parts)

    @torch.inference_mode()
    def follow(self, ids: list[int], given: int) -> Tensor:
        """Logits [T - given, V] that predict ``ids[given:]``: the first ``given`` as a prompt, then token by token.

        What a decode step does differently from a prompt (lossy modes, kernels) is in them; ``logits`` has it not.
        """
        self._check(ids)
        if not 1 <= given < len(ids):
            raise PromptError(f"{given} given tokens of {len(ids)}: at least 1, and fewer than there are")
        if isinstance(self.predictor, Oracle):
            raise ConfigError("predictor 'oracle' knows what it has seen generated, not a text that is given")
        with self._guarded(), ExitStack() as at_last:
            at_last.callback(self.runtime.let_go)
            self._meter.lap()
            logits, past = self._forward(ids[:given], None, given - 1, Phase.PREFILL)
            rows = [logits]
            for position in range(given, len(ids) - 1):
                logits, past = self._forward([ids[position]], past, position, Phase.DECODE)
                self._inform(self.prefetcher.controller)
                rows.append(logits.clone())
            self.runtime.finish()
        return torch.stack(rows)

    @property
    def deviation(self) -> Deviation | None:
        """How far this engine has departed from the exact one since it was built or reset; None where it is exact."""
        return deviation_of(self.runtime)

    def close(self) -> None:
        """Stop the readers, close the files, take the hooks off, let go of the pool."""
        self.runtime.let_go()
        self.transfer.close()
        self.store.close()
        self.step.close()
        self.layers.close()
        self.signals.close()
        self.dense.close()
        uninstall(self._modules)
        self._views.clear()

    # Building

    def _check_config(self, config: RunConfig) -> None:
        POLICIES.check(config.cache_policy)
        choice.check(config.predictor)
        deepest = max(1, self.spec.layers - 1)
        if config.lookahead is not None and config.lookahead > deepest:
            raise ConfigError(f"lookahead {config.lookahead}: at most {deepest} with {self.spec.layers} MoE layers")

    def _plan(self) -> SlotPlan:
        return plan_slots(
            self.config.memory_budget,
            slot_bytes=self.spec.expert_slot_bytes,
            experts=self.spec.experts,
            dense_bytes=self.spec.dense_bytes,
            overhead_bytes=self.overhead_bytes,
        )

    def _identity(self) -> ModelIdentity:
        return ModelIdentity(
            name=self.config.model,
            fingerprint=self.checkpoint.fingerprint,
            experts=self.spec.experts_per_layer,
            top_k=self.spec.top_k,
            hidden_size=self.spec.hidden_size,
            original=original_fingerprint(self.checkpoint.directory),
        )

    def _attach(self) -> None:
        """Watch the model; its expert modules will be ours."""
        spec = self.spec
        self._modules = [self.model.get_submodule(path) for path in spec.module_paths]
        for module, layout in zip(self._modules, self.checkpoint.layouts, strict=True):
            check_supported(module, layout, spec.model_type)
        self.dense = DenseKernels(self.model)
        self.signals = ModelSignals(self.model, spec.module_paths, spec.experts_per_layer, spec.top_k, spec.model_type)
        self.layers = DecoderLayers(self.model, self.signals, self.dense.clock)
        self.step = DecodeStep(self.model, self.layers, self.signals.parts, self.dense.clock)

    def _build(self, pool: SlotPool | None = None) -> None:
        config = self.config
        if pool is None:
            self.pool = SlotPool(self.plan.slots, self.plan.slot_bytes)
            self._views = SlotViews(self.pool)
        self.pool.peak_slots = 0
        self.readers = choose(parse_readers(config.reader_threads), self.store, self.pool, self.spec.experts_per_layer)
        reading: Any = {"threads": self.readers.threads, "timeout_s": config.read_timeout_s}
        low = self._low_pack()
        self._extra: dict[str, Any] = {}
        self.transfer: AnyTransfer | PairedTransfer = open_transfer(self.store, self.pool, **reading)
        if low is not None:
            self.transfer = low.join(self.transfer, self.pool, **reading)
            self._extra = {"low": low.checkpoint}
        self.predictor: Predictor = choice.make_predictor(config.predictor, config.lookahead, self._identity)
        self._assemble()

    def _low_pack(self) -> LowPack | None:
        """What low-precision-miss reads from. Raises ConfigError where the lossy mode of the config cannot run."""
        if self.config.lossy is not None:
            check_family(self._modules, self.config.lossy, self.spec.model_type)
        name = self.config.low_precision_pack
        return None if name is None else LowPack(name, self.checkpoint, self._modules)

    def _assemble(self) -> None:
        """The parts with state, new and cold, over the same pool, model and reader threads."""
        config, spec = self.config, self.spec
        self.staging = self._plan_staging()
        # Where every expert fits, nothing is ever evicted: then the cheapest policy does, and none watches the routing.
        policy = config.cache_policy if self.plan.slots < spec.experts else "lru"
        where = np.full((spec.layers, max(spec.experts_per_layer)), -1, np.int32)
        self.cache = ExpertCache(self.pool, POLICIES.load(policy)(), events=self.events, where=where)
        controller = Controller(
            parse_prefetch(config.prefetch),
            expert_bytes=spec.expert_slot_bytes,
            chunk_bytes=CHUNK_BYTES,
            readers=self.readers.threads,
            layers=spec.layers,
            top_k=spec.top_k,
            off_reason=self.staging.off_reason,
        )
        shorten = getattr(self.predictor, "name_at_most", None)
        if shorten is not None and config.lossy is None:
            shorten(depth(spec.top_k, parse_prefetch(config.prefetch)))
        self.prefetcher = Prefetcher(
            self.cache,
            self.transfer,
            controller,
            experts=spec.experts_per_layer,
            top_k=spec.top_k,
            may_stream=parse_prefetch(config.prefetch) != 0,
            events=self.events,
        )
        mode = MODES[config.lossy]
        self.pipeline = mode.pipeline(self.cache, self.transfer, self.prefetcher)
        self.runtime = mode.runtime(
            cache=self.cache,
            pipeline=self.pipeline,
            prefetcher=self.prefetcher,
            predictor=self.predictor,
            signals=self.signals,
            views=self._views,
            layout_of=self.checkpoint.layout_of,
            experts=spec.experts_per_layer,
            decode_staging=self.staging.slots,
            clock=self.dense.clock,
            early=self.layers.watch(where, self.pool.slots, self.checkpoint.layout_of),
            forget=self.step.forget,
            **(self._extra if config.lossy else {}),
        )
        self._meter = Meter(self.cache, self.transfer, self.pipeline, self.prefetcher, self.dense.clock)
        install(self.runtime, self._modules)

    def _plan_staging(self) -> Staging:
        if self.config.predictor == "none":
            return Staging(0, "predictor is none")
        return plan_staging(
            self.plan,
            self.spec.experts,
            self.spec.top_k,
            limit=parse_prefetch(self.config.prefetch),
            reach=choice.reach(self.predictor),
        )

    # Running

    def _record(self, oracle: Oracle, prompt_ids: list[int], sampling: SamplingConfig) -> None:
        """Run once without speculation to learn the routing, then forget everything that this has cached."""
        recorder, listeners, plain = RouteRecorder(), self.runtime.observers, self.config
        self.predictor = PREDICTORS.load("none")()
        quiet: dict[str, Any] = {"predictor": "none", "prefetch": "auto", "lookahead": None}
        self.config = replace(plain, **quiet, lossy=None, low_precision_pack=None)
        try:
            self._renew([recorder])
            with self.events.muted():
                for _ in self._run(prompt_ids, sampling):
                    pass
        finally:
            self.predictor, self.config = oracle, plain
            with self.events.muted():
                self._renew(listeners)
        oracle.load(recorder, (tuple(prompt_ids), sampling))

    def _renew(self, observers: list[RoutingObserver]) -> None:
        """Cold again, with ``observers`` listening."""
        self.runtime.finish()
        self.cache.clear()
        self._assemble()
        self.runtime.observers = observers
        self._runs = 0

    def _check(self, ids: list[int]) -> None:
        check_length(ids, self.context)
        strange = next((i for i in ids if not 0 <= i < self.spec.vocab_size), None)
        if strange is not None:
            raise PromptError(f"token id {strange} is outside the vocabulary of {self.spec.vocab_size:,}")
        if self._failed:
            raise ForegateError(f"this engine has failed and must be rebuilt: {self._failed}")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever breaks a forward pass, an interrupt included, may leave cache and reads half-changed: note it."""
        try:
            yield
        except BaseException as error:
            self._failed = str(error) or type(error).__name__
            raise

    def _run(self, prompt_ids: list[int], sampling: SamplingConfig) -> Iterator[GenerationStep]:
        reporter = Reporter(self, self._meter, prompt_tokens=len(prompt_ids), cold=self._runs == 0)
        self.report = reporter.report
        self._runs += 1
        try:
            yield from self._steps(prompt_ids, sampling, reporter)
        finally:
            with suppress(IntegrityError) if self._failed else nullcontext():
                self.runtime.finish()
            reporter.close()

    def _steps(self, prompt_ids: list[int], sampling: SamplingConfig, reporter: Reporter) -> Iterator[GenerationStep]:
        sampler, detokenizer = Sampler(sampling), Detokenizer(self.tokenizer)
        room = min(sampling.max_new_tokens, self.context - len(prompt_ids))
        stop = stop_ids(self.model)
        ids, past = prompt_ids, None
        for index in range(room):
            began = perf_counter()
            phase = Phase.DECODE if index else Phase.PREFILL
            with self._guarded():
                logits, past = self._forward(ids, past, len(prompt_ids) + index - 1, phase)
            token = sampler.choose(logits)
            finish = FinishReason.STOP if token in stop else FinishReason.LENGTH if index == room - 1 else None
            if finish:
                self.runtime.finish()
            elif phase is Phase.DECODE:
                self._go_ahead(token, past)
            if phase is Phase.DECODE:
                self._inform(self.prefetcher.controller)
            text = "" if finish is FinishReason.STOP else detokenizer.add(token)
            if finish:
                text += detokenizer.flush()
            step = reporter.step(token, text, phase, began, finish, self._meter.last)
            left = perf_counter_ns()
            yield step
            if finish:
                return
            self.dense.clock.away(left, perf_counter_ns())
            ids = [token]

    @torch.inference_mode()
    def _forward(self, ids: list[int], past: Any, position: int, phase: Phase) -> tuple[Tensor, Any]:
        if self.events.on:
            self.events.emit(PassBegan(perf_counter_ns(), phase, position - len(ids) + 1, len(ids)))
        began = perf_counter()
        if phase is Phase.PREFILL:
            self.runtime.begin_prefill()
            *_, out = self._chunks(ids, keep=1)
            make_room(out.past_key_values)
            self.runtime.end_prefill()
            self._learned(perf_counter() - began)
            self.step.begin()
        else:
            self.runtime.begin_decode(position, ids[-1])
            with self.dense.decode():
                logits = self.step(ids[-1], past)
                out = self._call(torch.tensor([ids]), past, keep=1) if logits is None else None
            if logits is not None:
                return logits, past
        return out.logits[0, -1], out.past_key_values

    @torch.inference_mode()
    def _go_ahead(self, token: int, past: Any) -> None:
        """Begin the step that will most likely follow: what is left to be said of the last one is said, and shown to
        the user, while experts of the first layer are being computed."""
        if not self.events.on:
            with self._guarded(), self.dense.decode():
                self.step.go_ahead(token, past)

    def _chunks(self, ids: list[int], *, keep: int) -> Iterator[Any]:
        """The forwards that read ``ids`` as a prompt, one chunk after another over one KV cache."""
        past = None
        size = self.config.prefill_chunk if self.spec.model_type not in READ_WHOLE else len(ids)
        for first, last in chunk_bounds(len(ids), size):
            self.runtime.begin_chunk(first)
            out = self._call(torch.tensor([ids[first:last]]), past, keep=keep)
            past = out.past_key_values
            yield out

    def _inform(self, controller: Controller) -> None:
        """A lap ends: tell ``controller`` what this step has read and waited for."""
        step = self._meter.lap()
        controller.link.saw_io(step.demand_bytes + step.prefetch_bytes, step.io_s)
        controller.saw_misses(step.misses - step.late, step.demand_stall_s)
        controller.saw_step(step.misses - step.late + step.used, step.stall_s, step.prefetch_bytes)

    def _learned(self, seconds: float) -> None:
        """A lap ends with a prompt that was read in ``seconds``: what that says of the link. The first has shown
        whether the model's routers can be asked ahead; if not, say so and do not."""
        step = self._meter.lap()
        nbytes = step.demand_bytes + step.prefetch_bytes
        self.prefetcher.controller.link.saw_prompt(nbytes, step.io_s, step.stall_s, seconds)
        self.signals.stop_learning()
        if self.signals.distrust and self.predictor.asks_routers:
            self.runtime.give_up_predicting(self.signals.distrust)

    def _call(self, ids: Tensor, past: Any, *, keep: int) -> Any:
        """One forward of the stock model. ``keep`` 1 computes the logits of the last position alone, where it can."""
        extra = {"logits_to_keep": keep} if self._keeps_logits else {}
        return self.model(input_ids=ids, past_key_values=past, use_cache=True, **extra)
