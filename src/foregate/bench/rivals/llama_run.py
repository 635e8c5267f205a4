"""The program that runs llama.cpp: ``python -m foregate.bench.rivals.llama_run FILE.gguf TOKENS.json --threads 2``.

Low-level API only. Defaults are llama.cpp's own but for ``use_extra_bufts``: with it weights are repacked into memory
of their own for AMX, which neither leaves them mapped nor survives prefill on some machines.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foregate.bench.rivals.outcome import Feed, Tokens, measure, read_tokens
from foregate.errors import CheckpointError, ForegateError

SAID = (3, 4)
"""ggml's log levels that are passed on: warnings and errors; the others are chatter."""


class Llama:
    """A model and its context; ``feed`` has the signature of ``outcome.Feed``. Pass everything by position: ctypes."""

    def __init__(self, library: Any, path: Path, context: int, threads: int, *, exact: bool = False) -> None:
        self._llama = library
        library.llama_backend_init()
        self._model = library.llama_model_load_from_file(os.fsencode(path), self._model_settings())
        if not self._model:
            raise CheckpointError(f"{path}: llama.cpp cannot load it (its own words are on stderr)")
        self._context = library.llama_init_from_model(self._model, self._context_settings(context, threads, exact))
        if not self._context:
            raise CheckpointError(f"{path}: llama.cpp makes no context of {context} tokens")
        self.vocabulary = int(library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model)))

    def _model_settings(self) -> Any:
        settings = self._llama.llama_model_default_params()
        settings.use_mmap = True
        settings.use_mlock = False
        settings.use_extra_bufts = False
        settings.n_gpu_layers = 0
        return settings

    def _context_settings(self, context: int, threads: int, exact: bool) -> Any:
        settings = self._llama.llama_context_default_params()
        settings.n_ctx = context
        settings.n_batch = context
        settings.n_threads = settings.n_threads_batch = threads
        if exact:
            settings.type_k = settings.type_v = self._llama.GGML_TYPE_F32
            settings.flash_attn_type = self._llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return settings

    def warm(self, tokens: Tokens) -> None:
        """Run all of ``tokens`` and forget them: what they need is then in memory."""
        self.feed(tokens.prompt)
        for token in tokens.stream:
            self.feed([token])
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def feed(self, tokens: list[int]) -> int:
        return int(self.logits(tokens).argmax())

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """The logits after the last of ``tokens``, [vocabulary]; valid until the next call."""
        if max(tokens) >= self.vocabulary:
            raise CheckpointError(f"token {max(tokens)} is not below the vocabulary of {self.vocabulary}")
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        code = self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(array, len(tokens)))
        if code != 0:
            raise ForegateError(f"llama_decode answers {code} for {len(tokens)} tokens")
        return np.ctypeslib.as_array(self._llama.llama_get_logits_ith(self._context, -1), (self.vocabulary,))


def load(path: Path, tokens: Tokens, threads: int, *, exact: bool = False) -> Llama:
    """``exact``: keys and values in fp32, plain attention; not what users run. Raises CheckpointError."""
    import llama_cpp

    _quiet(llama_cpp)
    return Llama(llama_cpp, path, tokens.context, threads, exact=exact)


def _quiet(library: Any) -> None:
    """Only warnings and errors of llama.cpp reach stderr."""

    def say(level: int, text: bytes, _: Any) -> None:
        if level in SAID:
            sys.stderr.write(text.decode(errors="replace"))

    callback = library.llama_log_callback(say)
    library.llama_log_set(callback, ctypes.c_void_p(0))
    # ctypes does not keep the callback alive
    library.foregate_log_callback = callback


def main() -> int:
    options = _options()
    tokens = read_tokens(options.tokens)
    import llama_cpp

    def ready() -> Feed:
        model = load(options.gguf, tokens, options.threads)
        if options.warm:
            model.warm(tokens)
        return model.feed

    settings: dict[str, Any] = {"threads": options.threads, "warm": options.warm, "file": options.gguf.name}
    settings |= {"use_mmap": True, "use_extra_bufts": False}
    settings["system"] = llama_cpp.llama_print_system_info().decode()
    version = f"llama-cpp-python {llama_cpp.__version__}"
    done = measure(tokens, ready, rival="llama.cpp", version=version, settings=settings)
    print(done.line())
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("tokens", type=Path, help='{"prompt": [ids], "stream": [ids]}')
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm", action="store_true", help="run all of it once before, as part of loading")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ForegateError as error:
        sys.exit(f"error: {error}")
