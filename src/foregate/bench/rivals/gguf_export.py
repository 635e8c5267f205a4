"""``python -m foregate.bench.rivals.gguf_export MODEL OUT.gguf``: a Qwen3-MoE checkpoint as a GGUF file.

Written tensor by tensor: memory holds one fused tensor as it is written, and one expert in fp32. gguf_tensors.py says
which tensors, gguf_settings.py which settings.
Shapes: E experts, D hidden, F expert hidden.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from foregate.bench.rivals.gguf_settings import ARCHITECTURE, write_settings
from foregate.bench.rivals.gguf_tensors import Fused, floats, plan
from foregate.bench.rivals.rival import Progress
from foregate.checkpoint.fingerprint import fingerprint
from foregate.checkpoint.locate import locate
from foregate.checkpoint.model_config import read_config
from foregate.checkpoint.reason import reason
from foregate.checkpoint.shards import read_shards
from foregate.errors import CheckpointError, ConfigError, ForegateError

FINGERPRINT = "foregate.source_fingerprint"
"""The key under which the file says what it was made from."""

FORMATS = {
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}
"""Name → type of the matrices, and the type of the file as llama.cpp calls it."""


def export(
    model_dir: Path,
    out: Path,
    dtype: str = "q8_0",
    dense: str | None = None,
    *,
    tokenizer: bool = True,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Write the checkpoint in ``model_dir`` to ``out``: experts in ``dtype``, other matrices in ``dense`` (the same).

    Norms and routers are fp32, as in every GGUF file. Without ``tokenizer`` the file knows token ids only. A file there
    already, made from the same checkpoint with the same types, is kept; a build that was killed is begun anew.

    Raises UnsupportedModelError naming the family, setting or tokenizer that GGUF's Qwen3-MoE cannot express,
    ConfigError for an unknown type or another file in the way, CheckpointError for weights that cannot be read or
    written.
    """
    expert_type, dense_type = _type(dtype), _type(dense or dtype)
    raw = read_config(model_dir)
    writer = GGUFWriter(None, ARCHITECTURE)
    write_settings(writer, model_dir, raw, tokenizer=tokenizer)
    shards = read_shards(model_dir, raw.get("transformers_weights"))
    tensors = plan(raw, shards, expert_type, dense_type)
    source = (
        f"{fingerprint(raw, shards.tensors.values())} {dtype} {dense or dtype} {'' if tokenizer else 'no '}tokenizer"
    )
    if _is_there(out, source):
        return out
    writer.add_string(FINGERPRINT, source)
    writer.add_file_type(FORMATS[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.stored_shape, tensor.stored_dtype, tensor.nbytes, tensor.type)
    _write(writer, tensors, out, progress)
    return out


def _type(name: str) -> GGMLQuantizationType:
    if name not in FORMATS:
        raise ConfigError(f"unknown GGUF type {name!r}; choose from: {', '.join(FORMATS)}")
    return FORMATS[name][0]


def _is_there(out: Path, source: str) -> bool:
    """True for the same file; raises ConfigError for any other."""
    if not out.exists():
        return False
    try:
        field = gguf.GGUFReader(out).get_field(FINGERPRINT)
        found = None if field is None else field.contents()
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"{out} is there and is no GGUF file ({reason(error)}); remove it") from error
    if found != source:
        raise ConfigError(
            f"{out} is there and was made from something else ({found}); remove it or choose another name"
        )
    return True


def _write(writer: GGUFWriter, tensors: list[Fused], out: Path, progress: Progress) -> None:
    total = sum(tensor.nbytes for tensor in tensors)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(out.parent).free < total:
            raise CheckpointError(f"{out}: {total} bytes are to be written, and the disk has less")
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        progress(0, total)
        for tensor in tensors:
            writer.write_tensor_data(encode(tensor))
            done += tensor.nbytes
            progress(done, total)
        writer.close()
        _settle(partial)
        partial.replace(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {reason(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def encode(tensor: Fused) -> NDArray[np.generic]:
    """The tensor as its bytes lie in the file; experts are stacked [E, rows, …] and converted one at a time."""
    out = np.empty(tensor.stored_shape, tensor.stored_dtype)
    parts = out if tensor.stacked else out[None]
    for part, segment in zip(parts, tensor.parts, strict=True):
        part[...] = gguf.quantize(floats(segment), tensor.type)
    return out


def _settle(path: Path) -> None:
    """Bytes on the disk and out of the page cache, so that the next reader finds them cold."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m foregate.bench.rivals.gguf_export", description=__doc__)
    parser.add_argument("model", help="directory, hub id or 'reference'")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--dtype", default="q8_0", choices=FORMATS, help="of the experts (%(default)s)")
    parser.add_argument("--dense", default=None, choices=FORMATS, help="of all other matrices (the same)")
    parser.add_argument("--no-tokenizer", action="store_true", help="a file that knows token ids only")
    options = parser.parse_args(arguments)
    from foregate.testing.large import printer

    began = time.perf_counter()
    tokenizer = not options.no_tokenizer
    export(locate(options.model), options.out, options.dtype, options.dense, tokenizer=tokenizer, progress=printer())
    nbytes, seconds = options.out.stat().st_size, time.perf_counter() - began
    print(f"{options.out}: {nbytes} bytes in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ForegateError as error:
        sys.exit(f"error: {error}")
