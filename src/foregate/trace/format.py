"""The names, numbers and Parquet columns of ``foregate-trace/1``. docs/trace-format.md is the same in words.

Shapes: N rows = T tokens x L MoE layers, token by token; k width of the expert lists, S width of the score lists.
"""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

VERSION = "foregate-trace/1"
HEADER_FILE = "trace.json"
MANIFEST_FILE = "manifest.jsonl"
PARTS = "parts"
FEATURES = "features"
FOOTER_KEY = b"foregate.trace"
"""Key of the Parquet footer under which every part says what it is a part of."""

TIMINGS = ("attention_ns", "routing_ns", "dispatch_ns", "experts_ns", "expert_wait_ns")
FEATURE_NAMES = ("pre_attention", "residual", "router_input")
FEATURE_DTYPES = ("float16", "bfloat16")
SCORE_KINDS = ("logits", "probabilities")

PREFILL, DECODE = "prefill", "decode"
UNKNOWN_TOKEN = -1
"""Token id in memory where there is none (embeddings were given); null on disk."""
NOT_MEASURED = -1
"""Nanoseconds in memory where nothing was measured; null on disk."""

_UNSAFE = re.compile(r"[^A-Za-z0-9._]+")


def expert_dtype(experts: int) -> str:
    """Type of expert ids for layers of up to ``experts`` experts; its largest value is the padding."""
    return "uint8" if experts <= np.iinfo(np.uint8).max else "uint16"


def padding(dtype: str) -> int:
    """The id that fills the list of a layer whose router chooses fewer than k."""
    return int(np.iinfo(np.dtype(dtype)).max)


def part_schema(experts: str, *, scores: bool, timings: tuple[str, ...]) -> pa.Schema:
    """Columns of a part, in order. ``experts`` is the type of the expert ids."""
    fields = [
        pa.field("prompt", pa.dictionary(pa.int32(), pa.string())),
        pa.field("domain", pa.dictionary(pa.int32(), pa.string())),
        pa.field("phase", pa.dictionary(pa.int32(), pa.string())),
        pa.field("pass", pa.int32()),
        pa.field("position", pa.int32()),
        pa.field("token_id", pa.int32()),
        pa.field("layer", pa.uint16()),
        pa.field("experts", pa.list_(pa.uint8() if experts == "uint8" else pa.uint16())),
        pa.field("weights", pa.list_(pa.float32())),
    ]
    if scores:
        fields.append(pa.field("scores", pa.list_(pa.float32())))
    return pa.schema(fields + [pa.field(name, pa.int64()) for name in timings])


def part_stem(prompt: str) -> str:
    """File name, without suffix, of the part of ``prompt``: the same on every machine, so that none is there twice."""
    slug = _UNSAFE.sub("-", prompt).strip("-.")[:60] or "prompt"
    return f"{slug}-{xxhash.xxh3_64_hexdigest(prompt.encode())[:8]}"


def checksum(content: bytes) -> str:
    """xxh3, 128 bits, as 32 hexadecimal digits."""
    return str(xxhash.xxh3_128_hexdigest(content))


def content_hash(tokens: NDArray[np.int32]) -> str:
    """What a prompt says: xxh3 (64 bits) of its token ids as little-endian int32. Splits go by it."""
    return str(xxhash.xxh3_64_hexdigest(np.ascontiguousarray(tokens, "<i4").tobytes()))
