"""A random checkpoint of several gigabytes, shaped like Qwen3-MoE, written shard by shard in a few MB of memory.

``python -m foregate.testing.large OUT --gigabytes 4`` builds it. Values are bfloat16 made from random bits.
Shapes: E experts, k chosen, D hidden, F expert hidden, V vocabulary.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, GenerationConfig

from foregate.errors import ConfigError
from foregate.testing.families import COMMON
from foregate.testing.shards import header, shard_name, split
from foregate.testing.tiny import source
from foregate.testing.tokenizer import BOS, EOS, PAD, VOCAB_SIZE, save_tokenizer

HEAD_DIM = 64
SHARD_BYTES = 1 << 30
BLOCK = 1 << 20
"""Values generated at a time: 2 MiB of bfloat16, which stays in the cache of the processor."""

BF16_ONE = 0x3F80
SPREAD = 2.42
"""Root mean square of ±m·2^e for m in [1, 2) and e in {0, 1}, both uniform: the shape of every random value here."""

Progress = Callable[[int, int], None]
"""Told (bytes written, bytes in all) after every tensor."""


@dataclass(frozen=True)
class LargeShape:
    """Sizes of the model. One expert is 6·D·F bytes; with the defaults 3 MiB, and a layer is 192 MiB."""

    layers: int
    hidden: int = 1024
    experts: int = 64
    expert_width: int = 512
    chosen: int = 4
    head_dim: int = HEAD_DIM
    """Of each of ``hidden`` / 64 heads; Qwen3-30B-A3B has 128."""

    def __post_init__(self) -> None:
        sizes = (self.layers, self.expert_width, self.chosen, self.head_dim)
        if min(sizes) < 1 or self.hidden % HEAD_DIM or self.hidden < HEAD_DIM or self.head_dim % 2:
            raise ConfigError(f"sizes must be positive, hidden a multiple of {HEAD_DIM} and head_dim even: {self}")
        if self.chosen > self.experts:
            raise ConfigError(f"cannot choose {self.chosen} of {self.experts} experts")

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_DIM

    @property
    def kv_heads(self) -> int:
        return math.gcd(self.heads, 4)

    @property
    def layer_expert_bytes(self) -> int:
        """Bytes of the routed experts of one layer."""
        return self.experts * 3 * self.hidden * self.expert_width * 2

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, counted without listing every layer."""
        layer = sum(tensor.nbytes for tensor in self.layer_tensors(""))
        return self.layers * layer + sum(tensor.nbytes for tensor in self.outer_tensors())

    def config(self) -> dict[str, Any]:
        """Keyword arguments of ``Qwen3MoeConfig``."""
        return {
            **COMMON,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.expert_width,
            "moe_intermediate_size": self.expert_width,
            "num_experts": self.experts,
            "num_experts_per_tok": self.chosen,
            "norm_topk_prob": True,
            "max_position_embeddings": 4096,
            "dtype": "bfloat16",
            "architectures": ["Qwen3MoeForCausalLM"],
        }

    def tensors(self) -> Iterator[PlannedTensor]:
        """Every tensor, in the order of the file."""
        embedding, norm, head = self.outer_tensors()
        yield embedding
        for layer in range(self.layers):
            yield from self.layer_tensors(f"model.layers.{layer}.")
        yield from (norm, head)

    def outer_tensors(self) -> tuple[PlannedTensor, PlannedTensor, PlannedTensor]:
        """Embedding, last norm, output head."""
        table = (VOCAB_SIZE, self.hidden)
        return (
            PlannedTensor("model.embed_tokens.weight", table),
            PlannedTensor("model.norm.weight", (self.hidden,)),
            PlannedTensor("lm_head.weight", table),
        )

    def layer_tensors(self, prefix: str) -> Iterator[PlannedTensor]:
        yield PlannedTensor(prefix + "input_layernorm.weight", (self.hidden,))
        for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            yield PlannedTensor(f"{prefix}self_attn.{name}_proj.weight", (heads * self.head_dim, self.hidden))
        yield PlannedTensor(prefix + "self_attn.o_proj.weight", (self.hidden, self.heads * self.head_dim))
        yield PlannedTensor(prefix + "self_attn.q_norm.weight", (self.head_dim,))
        yield PlannedTensor(prefix + "self_attn.k_norm.weight", (self.head_dim,))
        yield PlannedTensor(prefix + "post_attention_layernorm.weight", (self.hidden,))
        yield PlannedTensor(prefix + "mlp.gate.weight", (self.experts, self.hidden))
        for expert in range(self.experts):
            yield from self.expert_tensors(f"{prefix}mlp.experts.{expert}.")

    def expert_tensors(self, prefix: str) -> Iterator[PlannedTensor]:
        yield PlannedTensor(prefix + "gate_proj.weight", (self.expert_width, self.hidden))
        yield PlannedTensor(prefix + "up_proj.weight", (self.expert_width, self.hidden))
        yield PlannedTensor(prefix + "down_proj.weight", (self.hidden, self.expert_width))


@dataclass(frozen=True)
class PlannedTensor:
    """One bfloat16 tensor: what it is called, how it is shaped, how its values are spread."""

    name: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return "BF16"

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return 2 * self.count

    @property
    def deviation(self) -> float:
        """Root mean square: outputs of variance 1, router logits of 4 (no ties), small embeddings."""
        gain = 4.0 if ".gate." in self.name else 0.5 if "embed" in self.name else 1.0
        return gain / math.sqrt(self.shape[-1])

    def blocks(self, seed: int) -> Iterator[NDArray[np.uint16]]:
        """The bits of the values, ``BLOCK`` at a time."""
        bits = source(self.name, seed).bit_generator
        for start in range(0, self.count, BLOCK):
            count = min(BLOCK, self.count - start)
            # Little endian whatever the machine, as safetensors has it.
            raw = np.asarray(bits.random_raw(-(-count // 4)), dtype="<u8").view("<u2")[:count]
            yield self.near_one(raw) if len(self.shape) == 1 else self.spread(raw)

    def spread(self, raw: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """Random bits → sign, one bit of the exponent and the mantissa kept, scaled to ``deviation``. In place."""
        exponent = round(math.log2(self.deviation / SPREAD)) + 127
        np.bitwise_and(raw, 0x80FF, out=raw)
        np.add(raw, exponent << 7, out=raw, casting="unsafe")
        return raw

    def near_one(self, raw: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """Random bits → values in [1, 1.25), for norms. In place."""
        np.bitwise_and(raw, 0x001F, out=raw)
        np.bitwise_or(raw, BF16_ONE, out=raw)
        return raw


def layers_for(total_bytes: int, **sizes: int) -> int:
    """Fewest layers whose routed experts reach ``total_bytes``."""
    return max(1, -(-total_bytes // LargeShape(layers=1, **sizes).layer_expert_bytes))


def build_large(
    directory: Path,
    total_bytes: int | None = None,
    *,
    layers: int | None = None,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
    **sizes: int,
) -> Path:
    """Write a checkpoint whose routed experts are at least ``total_bytes``, or which has ``layers`` layers.

    ``sizes`` are the other fields of ``LargeShape``. Same arguments, same bytes. The output row of the end token is
    zero, so greedy generation runs to the length asked for. Raises ConfigError for sizes that cannot be, or a disk
    that is too small.
    """
    if (total_bytes is None) == (layers is None):
        raise ConfigError(f"give total_bytes or layers, one of them (got {total_bytes} and {layers})")
    shape = LargeShape(layers=layers if layers is not None else layers_for(total_bytes or 0, **sizes), **sizes)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory, shape, seed, progress, shard_bytes)
    AutoConfig.for_model("qwen3_moe", **shape.config()).save_pretrained(directory)
    GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def write_weights(directory: Path, shape: LargeShape, seed: int, progress: Progress, shard_bytes: int) -> None:
    """Every shard, then the index that names them."""
    total = shape.nbytes
    require_space(directory, total)
    shards = split(shape.tensors(), shard_bytes)
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, start=1):
        name = shard_name(number, len(shards))
        with (directory / name).open("wb") as file:
            file.write(header(shard))
            for tensor in shard:
                write_tensor(file, tensor, seed)
                weight_map[tensor.name] = name
                done += tensor.nbytes
                progress(done, total)
    index = {"metadata": {"total_parameters": total // 2, "total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def require_space(directory: Path, nbytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if nbytes > free:
        raise ConfigError(f"{directory} has {free} bytes free, the checkpoint needs {nbytes}")


def write_tensor(file: BinaryIO, tensor: PlannedTensor, seed: int) -> None:
    start = file.tell()
    for block in tensor.blocks(seed):
        file.write(block.data)
    if tensor.name == "lm_head.weight":
        row = 2 * tensor.shape[1]
        file.seek(start + EOS * row)
        file.write(bytes(row))
        file.seek(start + tensor.nbytes)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m foregate.testing.large", description=__doc__)
    parser.add_argument("out", type=Path, help="directory to write")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--gigabytes", type=float, default=4.0, help="10^9 bytes of routed experts, at least (%(default)s)"
    )
    size.add_argument("--layers", type=int, help="number of layers, instead of a size")
    for name in ("hidden", "experts", "expert_width", "chosen", "head_dim"):
        default = LargeShape.__dataclass_fields__[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    return parser


def printer() -> Progress:
    """Prints a line at every tenth of the way."""
    printed = 0

    def show(done: int, total: int) -> None:
        nonlocal printed
        if done * 10 // total > printed:
            printed = done * 10 // total
            print(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB", flush=True)

    return show


def main(arguments: list[str] | None = None) -> None:
    options = vars(parser().parse_args(arguments))
    out, gigabytes = options.pop("out"), options.pop("gigabytes")
    total_bytes = int(gigabytes * 1e9) if options["layers"] is None else None
    began = time.perf_counter()
    build_large(out, total_bytes, progress=printer(), **options)
    seconds = time.perf_counter() - began
    nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(f"{out}: {nbytes} bytes in {seconds:.1f} s, {nbytes / seconds / 1e6:.0f} MB/s")


if __name__ == "__main__":
    main()
