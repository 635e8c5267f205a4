"""vLLM as a tracing session drives it: ids in, rows out, one process (or one a tensor-parallel rank)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foregate.config import SamplingConfig
from foregate.errors import ConfigError, PromptError, TraceError
from foregate.trace.vllm.identity import external_id
from foregate.trace.vllm.layers import LayerShape
from foregate.trace.vllm.remote import attach, detach, take
from foregate.trace.vllm.sequence import RoutedSequence
from foregate.trace.vllm.versions import load

OURS = ("model", "dtype", "seed", "enforce_eager", "enable_prefix_caching", "kv_cache_memory_bytes", "max_num_seqs")
"""Arguments of ``LLM`` that are set here."""

ENVIRONMENT = {
    # the callables that record go to the workers as they are
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

TEMPLATES = ("auto", "off")


class VllmEngine:
    """A model loaded by vLLM, with a recorder in its first worker. ``shapes`` has one entry a MoE layer."""

    def __init__(
        self,
        directory: Path,
        *,
        dtype: str,
        seed: int,
        batch: int,
        kv_cache_bytes: int,
        scores: bool,
        timings: bool,
        more: Mapping[str, Any],
    ) -> None:
        """``more`` are further arguments of ``vllm.LLM``. Raises ConfigError, TraceError, and whatever vLLM does."""
        taken = sorted(set(more) & set(OURS))
        if taken:
            raise ConfigError(f"vLLM's {taken[0]} is set by Foregate; leave it out")
        with _environment(ENVIRONMENT):
            self._llm = load("vllm", "LLM")(
                model=str(directory),
                dtype=dtype,
                seed=seed,
                enforce_eager=True,
                enable_prefix_caching=False,
                kv_cache_memory_bytes=kv_cache_bytes,
                max_num_seqs=batch,
                **more,
            )
        self.shapes = self.attach(scores=scores, timings=timings)
        self.config: Any = self._llm.llm_engine.vllm_config
        self.context = int(self.config.model_config.max_model_len)
        self._tokenizer = self._llm.get_tokenizer()

    def attach(self, *, scores: bool, timings: bool) -> list[LayerShape]:
        """Begin to record. Raises TraceError for what cannot be traced."""
        found: list[list[LayerShape]] = self._llm.collective_rpc(attach, args=(scores, timings))
        return next(shapes for shapes in found if shapes)

    def detach(self) -> None:
        """Stop recording; what was not taken is lost."""
        self._llm.collective_rpc(detach)

    def encode(self, text: str, template: str) -> list[int]:
        """Token ids, through the chat template if ``template`` is auto and there is one. Raises PromptError."""
        if not text.strip():
            raise PromptError("the prompt is empty")
        if template == "auto" and getattr(self._tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": text}]
            given = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        else:
            given = self._tokenizer(text)
        ids = list(given["input_ids"])
        if not 0 < len(ids) < self.context:
            raise PromptError(f"the prompt has {len(ids):,} tokens; the context of {self.context:,} leaves no room")
        return ids

    def generate(self, prompts: Sequence[list[int]], sampling: Sequence[SamplingConfig]) -> list[RoutedSequence]:
        """Continue every prompt; what was routed of each, in the order of ``prompts``.

        Raises TraceError where that is not what vLLM says it computed.
        """
        outputs = self.run(prompts, sampling)
        routed = self.take()
        return [_checked(output, routed) for output in outputs]

    def run(self, prompts: Sequence[list[int]], sampling: Sequence[SamplingConfig]) -> list[Any]:
        """Continue every prompt; vLLM's own outputs."""
        given = [{"prompt_token_ids": ids} for ids in prompts]
        params = [self._params(len(ids), config) for ids, config in zip(prompts, sampling, strict=True)]
        outputs: list[Any] = self._llm.generate(given, params, use_tqdm=False)
        return outputs

    def take(self) -> dict[str, RoutedSequence]:
        """What was routed since the last call, by the id that vLLM gave the request."""
        found = (sequence for sequences in self._llm.collective_rpc(take) for sequence in sequences)
        return {external_id(sequence.request): sequence for sequence in found}

    def _params(self, prompt_tokens: int, config: SamplingConfig) -> Any:
        return load("vllm", "SamplingParams")(
            max_tokens=min(config.max_new_tokens, self.context - prompt_tokens),
            temperature=config.temperature,
            seed=config.seed if config.temperature else None,
            detokenize=False,
        )


def _checked(output: Any, routed: Mapping[str, RoutedSequence]) -> RoutedSequence:
    """The rows of a request, compared with the tokens that came out. The last token was sampled, and never routed."""
    tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids][:-1]
    sequence = routed.get(output.request_id)
    if sequence is None or sequence.token_ids.tolist() != tokens:
        found = 0 if sequence is None else len(sequence.token_ids)
        raise TraceError(f"vLLM: request {output.request_id}: {found} rows recorded for {len(tokens)} other tokens")
    return sequence


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the time being."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
