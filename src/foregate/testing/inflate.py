"""Inflation: a trained Mixture-of-Experts checkpoint of any size that computes what the original computes.

``python -m foregate.testing.inflate reference OUT --preset qwen3-30b-a3b`` builds one. Hidden and expert dimensions are
padded; what the padding needs to be zero is zero, everything else random. docs/inflation.md says why it is exact.
Shapes: D hidden, F expert hidden.
"""

from __future__ import annotations

import argparse
import errno
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from foregate import __version__
from foregate.checkpoint.dtypes import BITS
from foregate.checkpoint.locate import locate
from foregate.checkpoint.model_config import read_config
from foregate.checkpoint.opening import Checkpoint, open_checkpoint
from foregate.errors import CheckpointError, ConfigError, ForegateError
from foregate.testing.inflate_presets import PRESETS, growth_of
from foregate.testing.inflate_rules import Planned, expert_zero_share, plan
from foregate.testing.inflate_sizes import FACTORS, Growth, Inflation, fit
from foregate.testing.inflate_writer import NAME, Progress, check_space, copy_small_files, write_json, write_weights

SHARD_BYTES = 1 << 30


def inflate(
    model: str | Path,
    out: Path,
    hidden_factor: int = 4,
    intermediate: int | None = None,
    *,
    shared_intermediate: int | None = None,
    dense_intermediate: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Write ``model`` (a directory, hub id or ``reference``) to ``out``, D multiplied by ``hidden_factor``.

    ``intermediate`` is the new expert width F', ``shared_intermediate`` and ``dense_intermediate`` those of shared
    experts and dense layers, ``heads`` and ``kv_heads`` the attention's; None keeps a size. One expert then has
    3 D' F' weights. Same arguments, same bytes. Memory: the largest tensor of the original and a few MB.

    Raises ConfigError with the value for sizes that cannot be or an ``out`` that exists, UnsupportedModelError naming
    the family, CheckpointError for an original that cannot be read and a disk that is full; then nothing is kept.
    """
    growth = Growth(hidden_factor, intermediate, shared_intermediate, dense_intermediate, heads, kv_heads)
    return _build(open_checkpoint(locate(str(model))), Path(out), growth, seed, shard_bytes, progress)


def inflate_to(
    preset: str,
    model: str | Path,
    out: Path,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> Path:
    """As ``inflate``, with the layer shape of a published model (``PRESETS``). Raises the same errors."""
    checkpoint = open_checkpoint(locate(str(model)))
    return _build(checkpoint, Path(out), growth_of(preset, checkpoint), seed, shard_bytes, progress)


def _build(checkpoint: Checkpoint, out: Path, growth: Growth, seed: int, shard_bytes: int, progress: Progress) -> Path:
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed {seed!r} must be from 0 to 2^63 - 1")
    inflation = fit(checkpoint, growth)
    tensors = plan(checkpoint, inflation)
    _check_free(out)
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_space(out.parent, sum(tensor.nbytes for tensor in tensors))
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        temporary.chmod(0o755)
        write_weights(temporary, tensors, seed, shard_bytes, progress)
        copy_small_files(checkpoint.directory, temporary)
        _write_configs(temporary, checkpoint, inflation, tensors, seed)
        temporary.replace(out)
    except OSError as error:
        raise _explained(error, out) from error
    finally:
        # renamed away when all went well
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return out


def _write_configs(
    directory: Path, checkpoint: Checkpoint, inflation: Inflation, tensors: list[Planned], seed: int
) -> None:
    raw = {key: value for key, value in read_config(checkpoint.directory).items() if key != "transformers_weights"}
    write_json(directory / "config.json", {**raw, **inflation.config()})
    write_json(directory / NAME, record(checkpoint, inflation, tensors, seed))


def record(checkpoint: Checkpoint, inflation: Inflation, tensors: list[Planned], seed: int) -> dict[str, Any]:
    """What inflation.json says: the original, the sizes, and what is promised of one expert."""
    return {
        "source": str(checkpoint.directory),
        "source_fingerprint": checkpoint.fingerprint,
        "before": asdict(inflation.before),
        "after": asdict(inflation.after),
        "residual_copies": inflation.copies,
        "seed": seed,
        "expert_bytes": inflation.expert_weights * BITS[checkpoint.spec.dtype] // 8,
        "expert_zero_share": round(expert_zero_share(tensors), 6),
        "foregate_version": __version__,
    }


def _check_free(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} is there and is no directory; choose another output")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose another output")


def _explained(error: OSError, out: Path) -> ForegateError:
    said = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(f"{out}: no space left on the device ({said}); nothing was kept")
    if error.errno == errno.ENOTEMPTY:
        return ConfigError(f"{out} was filled by somebody else meanwhile; choose another output")
    return CheckpointError(f"{out}: cannot be written: {said}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m foregate.testing.inflate", description=__doc__)
    parser.add_argument("model", help="directory, hub id or 'reference'")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--preset", choices=PRESETS, help="layer shape of a published model, instead of sizes")
    parser.add_argument("--hidden-factor", type=int, help=f"one of {', '.join(map(str, FACTORS))} (4)")
    for name in ("intermediate", "shared-intermediate", "dense-intermediate", "heads", "kv-heads"):
        parser.add_argument(f"--{name}", type=int, help="(the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    return parser


def run(options: dict[str, Any]) -> str:
    """Build what the parsed ``options`` ask for. Returns one line to print."""
    from foregate.testing.large import printer

    model, out, preset, seed = (options.pop(name) for name in ("model", "out", "preset", "seed"))
    sizes = {name: value for name, value in options.items() if value is not None}
    if preset and sizes:
        raise ConfigError(f"preset {preset} fixes every size; leave out {', '.join(sizes)}")
    began = time.perf_counter()
    if preset:
        inflate_to(preset, model, out, seed=seed, progress=printer())
    else:
        inflate(model, out, **sizes, seed=seed, progress=printer())
    seconds = time.perf_counter() - began
    nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return f"{out}: {nbytes} bytes in {seconds:.1f} s, {nbytes / seconds / 1e6:.0f} MB/s; see {out / NAME}"


def main(arguments: list[str] | None = None) -> int:
    try:
        print(run(vars(parser().parse_args(arguments))))
    except ForegateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
