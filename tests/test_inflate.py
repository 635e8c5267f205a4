"""Inflation keeps the function: same tokens, same routing, same bits where the processor adds in the same order.

Shapes: T tokens, k chosen, D hidden, F expert hidden, V vocabulary.
"""

from __future__ import annotations

import errno
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from foregate.checkpoint.locate import locate
from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.pack import pack
from foregate.config import RunConfig, SamplingConfig
from foregate.engine.engine import Engine
from foregate.errors import CheckpointError, ConfigError, ForegateError, UnsupportedModelError
from foregate.testing import inflate_writer
from foregate.testing.inflate import inflate, inflate_to, main
from foregate.testing.inflate_presets import PRESETS, growth_of
from foregate.testing.inflate_sizes import fit
from foregate.testing.tiny import build, no_progress_bar
from foregate.types import RoutingStep

PROMPTS = ([5 + (7 * i) % 240 for i in range(24)], [9, 33, 7], [3 + (11 * i) % 200 for i in range(40)])
TEXTS = ("Question: Ann has 3 apples and buys 4. How many has she?\nAnswer:", "def read(self, path):\n    ")

TOLERANCE = 2e-5
"""Largest difference of a float32 logit, at logits of about 4: the order of addition may change with the shape."""

SAME_ORDER = torch.backends.cpu.get_cpu_capability() == "AVX512" and not torch.cpu._is_amx_tile_supported()
"""Where bfloat16 was measured to be the same bits: matrix kernels that add along the input in order."""

BLOCK = 4096

Tiny = Callable[[str], Path]
Outputs = list[tuple[torch.Tensor, list[torch.Tensor], list[int]]]


def stock(path: Path) -> Any:
    """The model as transformers loads it, complete."""
    with no_progress_bar():
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", experts_implementation="eager", output_loading_info=True
        )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@functools.cache
@torch.no_grad()
def outputs(path: Path) -> Outputs:
    """For each prompt: logits [T, V], chosen experts [T, k] of every layer, greedy tokens."""
    model = stock(path)
    found: Outputs = []
    for ids in PROMPTS:
        prompt = torch.tensor([ids])
        out = model(prompt, output_router_logits=True)
        routing = [r.topk(model.config.num_experts_per_tok).indices for r in out.router_logits if r is not None]
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
        found.append((out.logits[0].float(), routing, tokens[0].tolist()))
    return found


def check_same(one: Path, other: Path, tolerance: float) -> None:
    for (logits, routing, tokens), (wanted, right, expected) in zip(outputs(one), outputs(other), strict=True):
        assert tokens == expected
        assert len(routing) == len(right) > 0
        assert all(torch.equal(mine, own) for mine, own in zip(routing, right, strict=True))
        assert (logits - wanted).abs().max() <= tolerance


def engine_run(path: Path, prompts: list[list[int]], budget: str = "25%") -> tuple[list[list[int]], list[Any]]:
    """Greedy tokens, and every routing decision with its weights, under Foregate."""
    steps: list[RoutingStep] = []
    with Engine(RunConfig(model=str(path), memory_budget=budget, predictor="next-gate")) as engine:
        engine.observers.append(SimpleNamespace(on_route=steps.append))
        tokens = [[s.token_id for s in engine.stream(ids, SamplingConfig(max_new_tokens=8))] for ids in prompts]
        engine.cache.check_integrity(idle=True)
    return tokens, [(s.layer, s.position, s.experts.tolist(), s.weights) for s in steps]


def same_routing(one: list[Any], other: list[Any], tolerance: float = 1e-4) -> bool:
    """Same layers, positions and experts in rank order; router weights within ``tolerance``."""
    return len(one) == len(other) > 0 and all(
        a[:3] == b[:3] and np.abs(a[3] - b[3]).max() <= tolerance for a, b in zip(one, other, strict=True)
    )


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            found.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    return found


def expert_tensors(path: Path) -> dict[str, list[torch.Tensor]]:
    """Every routed expert's gate, up and down by its name."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in sorted(tensors(path).items()):
        if ".mlp.experts." in name:
            found.setdefault(name.rsplit(".", 2)[0], []).append(tensor)
    return found


def record(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "inflation.json").read_text())
    return content


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE in bfloat16, as the reference model is."""
    return build("qwen3_moe", tmp_path_factory.mktemp("inflate") / "bf16", dtype="bfloat16")


# The function


@pytest.mark.parametrize("factor", [4, 16])
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_same_tokens_and_routing(family: str, factor: int, tiny: Tiny, tmp_path: Path) -> None:
    check_same(inflate(tiny(family), tmp_path / "out", factor, 96), tiny(family), TOLERANCE)


@pytest.mark.skipif(not SAME_ORDER, reason="measured on AVX-512 without AMX only")
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_factor": 4, "intermediate": 200},
        {"hidden_factor": 16, "intermediate": 33, "dense_intermediate": 128},
        {"hidden_factor": 2, "heads": 8, "kv_heads": 4},
        {"hidden_factor": 8, "heads": 8, "kv_heads": 8},
        {"hidden_factor": 1, "intermediate": 64},
    ],
    ids=str,
)
def test_bfloat16_keeps_every_bit(sizes: dict[str, int], bf16: Path, tmp_path: Path) -> None:
    check_same(inflate(bf16, tmp_path / "out", **sizes), bf16, 0.0)


@pytest.mark.parametrize("heads", [(8, 2), (8, 8), (12, 4), (16, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_added_heads_say_nothing(family: str, heads: tuple[int, int], tiny: Tiny, tmp_path: Path) -> None:
    out = inflate(tiny(family), tmp_path / "out", 4, heads=heads[0], kv_heads=heads[1])
    assert stock(out).config.num_attention_heads == heads[0]
    check_same(out, tiny(family), TOLERANCE)


def test_shared_expert_and_biases_grow_too(tmp_path: Path) -> None:
    source = build("qwen2_moe", tmp_path / "source", tie_word_embeddings=True)
    out = inflate(source, tmp_path / "out", 8, 48, shared_intermediate=100, heads=8, kv_heads=8)
    assert tensors(out)["model.layers.0.mlp.shared_expert.down_proj.weight"].shape == (512, 100)
    assert "lm_head.weight" not in tensors(out)
    check_same(out, source, TOLERANCE)


def test_attention_bias_of_qwen3(tmp_path: Path) -> None:
    source = build("qwen3_moe", tmp_path / "source", attention_bias=True)
    check_same(inflate(source, tmp_path / "out", 16, heads=8, kv_heads=4), source, TOLERANCE)


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_padding_of_the_residual_stays_exactly_zero(factor: int, tiny: Tiny, tmp_path: Path) -> None:
    model = stock(inflate(tiny("qwen3_moe"), tmp_path / "out", factor, 64, heads=8, kv_heads=4))
    with torch.no_grad():
        streams = model(torch.tensor([PROMPTS[0]]), output_hidden_states=True).hidden_states[:-1]
    half, width = 64 * factor // 2, 64
    for stream in streams:
        copies = [stream[..., :width], stream[..., half : half + width]]
        padding = [stream[..., width:half], stream[..., half + width :]] if factor in (2, 8) else [stream[..., width:]]
        assert not any(part.any() for part in padding)
        assert factor in (4, 16) or torch.equal(*copies)


@pytest.mark.parametrize("factor", [4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 256])
def test_norms_are_the_same_bits(width: int, dtype: torch.dtype, factor: int) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    copies = 2 if factor in (8, 32) else 1
    root = round((factor // copies) ** 0.5)
    small = Qwen3MoeRMSNorm(width, eps=1e-6)
    large = Qwen3MoeRMSNorm(width * factor, eps=1e-6 / root**2)
    noise = torch.Generator().manual_seed(factor)
    x, padded = torch.randn(50, width, generator=noise).to(dtype), torch.zeros(50, width * factor, dtype=dtype)
    with torch.no_grad():
        small.weight.copy_(torch.rand(width, generator=noise) + 0.5)
        large.weight[:width] = small.to(dtype).weight / root
        for copy in range(copies):
            padded[:, copy * width * factor // copies :][:, :width] = x
        # a copy that begins inside a block of the sum is added to the same partial sums, and may round
        exact = copies == 1 or width * factor // 2 % 1024 == 0
        for rows in (slice(None), slice(1)):  # a prompt, one token
            want, got = small(x[rows]), large.to(dtype)(padded[rows])[:, :width]
            assert torch.equal(want, got) if exact else torch.allclose(want.float(), got.float(), rtol=2**-7)


# The engine, and trained weights


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_runs_under_the_engine_at_a_quarter(family: str, tiny: Tiny, tmp_path: Path) -> None:
    prompts = [list(ids) for ids in PROMPTS]
    tokens, routing = engine_run(inflate(tiny(family), tmp_path / "out", 4, 96), prompts)
    wanted, right = engine_run(tiny(family), prompts)
    assert tokens == wanted
    assert same_routing(routing, right)


def test_a_pack_of_it_runs_too(bf16: Path, tmp_path: Path) -> None:
    out = inflate(bf16, tmp_path / "out", 4, 96)
    pack(out, tmp_path / "packed")
    assert engine_run(tmp_path / "packed", [PROMPTS[0]])[0] == engine_run(bf16, [PROMPTS[0]])[0]


def reference(layers: int, directory: Path) -> Path:
    """The first ``layers`` layers of the reference model: trained weights."""
    try:
        source = locate("reference")
    except CheckpointError as error:
        pytest.skip(str(error))
    directory.mkdir()
    for path in source.iterdir():
        (directory / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    return directory


@pytest.mark.parametrize(("factor", "layers"), [(4, 4), (8, 2), (16, 2), pytest.param(4, 16, marks=pytest.mark.slow)])
def test_the_reference_model_routes_as_before(factor: int, layers: int, tmp_path: Path) -> None:
    source = reference(layers, tmp_path / "source")
    with Engine(RunConfig(model=str(source))) as engine:
        prompts = [engine.encode(text) for text in TEXTS]
    tokens, routing = engine_run(inflate(source, tmp_path / "out", factor), prompts)
    wanted, right = engine_run(source, prompts)
    assert tokens == wanted
    assert same_routing(routing, right, tolerance=0.0 if SAME_ORDER else 0.02)


# The bytes


@pytest.mark.parametrize(("factor", "width", "bound"), [(4, 512, 0.10), (8, 384, 0.07), (16, 256, 0.06)])
def test_experts_weigh_what_was_promised_and_are_no_runs_of_zeros(
    factor: int, width: int, bound: float, bf16: Path, tmp_path: Path
) -> None:
    out = inflate(bf16, tmp_path / "out", factor, width)
    promise = record(out)
    assert promise["expert_bytes"] == 3 * 64 * factor * width * 2 == open_checkpoint(out).spec.expert_bytes
    assert promise["expert_zero_share"] < bound
    for parts in expert_tensors(out).values():
        assert sum(part.nbytes for part in parts) == promise["expert_bytes"]
        zeros = sum(int((part == 0).sum()) for part in parts) * 2 / promise["expert_bytes"]
        assert zeros == pytest.approx(promise["expert_zero_share"], abs=1e-3)
        for part in parts:
            raw = part.view(torch.uint8).numpy().reshape(-1)
            assert raw[: len(raw) // BLOCK * BLOCK].reshape(-1, BLOCK).any(axis=1).all()


def test_no_block_of_any_file_is_all_zero(bf16: Path, tmp_path: Path) -> None:
    out = inflate(bf16, tmp_path / "out", 1, 4096)  # the most zeros that can be: nearly a third
    for file in out.glob("*.safetensors"):
        raw = np.fromfile(file, np.uint8)
        assert raw[: len(raw) // BLOCK * BLOCK].reshape(-1, BLOCK).any(axis=1).all()


def test_the_original_bits_lie_in_the_corner_and_keep_their_scale(bf16: Path, tmp_path: Path) -> None:
    own, grown = tensors(bf16), tensors(inflate(bf16, tmp_path / "out", 4, 96))
    for name, tensor in own.items():
        if ".mlp." in name and tensor.ndim == 2:
            rows, columns = tensor.shape
            assert torch.equal(grown[name][:rows, :columns], tensor)
            # int8 with a scale a row is then the same int8
            assert torch.equal(grown[name][:rows].abs().amax(1), tensor.abs().amax(1))


def test_same_seed_same_bytes_another_seed_another_fill(bf16: Path, tmp_path: Path) -> None:
    one, two, three = (inflate(bf16, tmp_path / f"{n}", 4, 64, seed=seed) for n, seed in enumerate((7, 7, 8)))
    name = "model-00001-of-00001.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes() != (three / name).read_bytes()
    check_same(three, one, 0.0 if SAME_ORDER else 0.05)


def test_shards_and_progress(bf16: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    out = inflate(bf16, tmp_path / "out", shard_bytes=300_000, progress=lambda done, total: told.append((done, total)))
    assert len(list(out.glob("*.safetensors"))) > 3
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert {total for _, total in told} == {told[-1][0]}
    assert (out / "tokenizer.json").read_bytes() == (bf16 / "tokenizer.json").read_bytes()
    open_checkpoint(out)


def test_a_large_tensor_is_made_in_blocks(bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inflate(bf16, tmp_path / "whole", 4, 96)
    monkeypatch.setattr("foregate.testing.inflate_fill.BLOCK", 5000)
    check_same(inflate(bf16, tmp_path / "out", 4, 96), whole, 0.0 if SAME_ORDER else 0.05)


@pytest.mark.parametrize(
    ("preset", "expert_bytes", "heads"),
    [
        ("qwen3-30b-a3b", 9_437_184, (48, 24)),
        ("olmoe-1b-7b", 12_582_912, (32, 32)),
        ("qwen1.5-moe-a2.7b", 17_301_504, (32, 32)),
    ],
)
def test_presets_reach_the_published_layers(
    preset: str, expert_bytes: int, heads: tuple[int, int], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(reference(16, tmp_path / "source"))
    inflation = fit(checkpoint, growth_of(preset, checkpoint))
    published = PRESETS[preset]
    assert inflation.after.hidden == published.hidden
    assert inflation.expert_weights * 2 == expert_bytes == published.expert_weights * 2
    assert (inflation.after.heads, inflation.after.kv_heads) == heads
    assert 64 * sum(heads) == published.queries + published.keys  # twice that times D' weights of attention


# Refusals


def refused(kind: type[ForegateError], *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        inflate(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"hidden_factor": 3}, "hidden factor 3 is none of 1, 2, 4"),
        ({"hidden_factor": 0}, "hidden factor 0"),
        ({"hidden_factor": -4}, "hidden factor -4"),
        ({"hidden_factor": 64}, "hidden factor 64"),
        ({"hidden_factor": 1}, "nothing to inflate"),
        ({"intermediate": 31}, "expert width 31 is below the model's own 32"),
        ({"dense_intermediate": -1}, "dense width -1 is below"),
        ({"shared_intermediate": 64}, "shared expert width 64: the model has none"),
        ({"heads": 7}, "7 attention heads are not a multiple of 2"),
        ({"heads": 4, "kv_heads": 1}, "key/value heads 1 is below the model's own 2"),
        ({"heads": 3, "kv_heads": 3}, "attention heads 3 is below the model's own 4"),
        ({"seed": -1}, "seed -1"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be(sizes: dict[str, int], said: str, bf16: Path, tmp_path: Path) -> None:
    assert said in refused(ConfigError, bf16, tmp_path / "out", **sizes)
    assert not (tmp_path / "out").exists()


def test_too_few_groups_for_the_heads(tmp_path: Path) -> None:
    source = build("qwen3_moe", tmp_path / "source", num_attention_heads=8, num_key_value_heads=2)
    message = refused(ConfigError, source, tmp_path / "out", heads=9, kv_heads=3)
    assert message == "9 attention heads over 3 key/value heads (3 on each) cannot hold the model's 8 over 2"


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss"])
def test_other_families_are_refused_by_name(family: str, tiny: Tiny, tmp_path: Path) -> None:
    assert f"model type '{family}' cannot be inflated" in refused(UnsupportedModelError, tiny(family), tmp_path / "out")


def test_packs_and_unknown_tensors_and_presets_are_refused(bf16: Path, tmp_path: Path) -> None:
    pack(bf16, tmp_path / "packed")
    assert "is a pack" in refused(UnsupportedModelError, tmp_path / "packed", tmp_path / "out")
    with pytest.raises(ConfigError, match="preset 'gpt-5' is none of"):
        inflate_to("gpt-5", bf16, tmp_path / "out")
    odd = build("qwen3_moe", tmp_path / "odd", hidden_size=48, head_dim=16)
    with pytest.raises(ConfigError, match=r"hidden size 2048 is not .* times the model's 48"):
        inflate_to("olmoe-1b-7b", odd, tmp_path / "out")


def test_float16_that_would_round_is_refused(tmp_path: Path) -> None:
    source = build("qwen3_moe", tmp_path / "source", dtype="float16")
    assert "too small to be divided by 2 in F16" in refused(CheckpointError, source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_output_that_is_there_is_left_alone(bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert "is not empty" in refused(ConfigError, bf16, tmp_path / "out")
    assert "is no directory" in refused(ConfigError, bf16, tmp_path / "out" / "mine")
    assert (tmp_path / "out" / "mine").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    inflate(bf16, tmp_path / "empty")


def test_too_little_space_is_seen_first(bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=3, f_frsize=4096))
    assert "has 12288 bytes free, the inflated checkpoint needs" in refused(CheckpointError, bf16, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_keeps_nothing(
    code: int, bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    message = refused(CheckpointError, bf16, tmp_path / "out")
    assert message == f"{tmp_path}/out: no space left on the device ({os.strerror(code)}); nothing was kept"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_keeps_nothing(bf16: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inflate(bf16, tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["/dev/null/inflated", "/proc/self/status/inflated"])
def test_places_where_nobody_can_write(out: str, bf16: Path) -> None:
    assert refused(CheckpointError, bf16, Path(out)).startswith(f"{out}: cannot be written: ")


def test_an_output_that_somebody_else_fills_is_left_to_them(bf16: Path, tmp_path: Path) -> None:
    def fill(done: int, total: int) -> None:
        (tmp_path / "out" / "theirs").mkdir(parents=True, exist_ok=True)

    assert "somebody else" in refused(ConfigError, bf16, tmp_path / "out", progress=fill)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


# The command


def test_command(bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(bf16), str(tmp_path / "out"), "--hidden-factor", "4", "--intermediate", "64"]) == 0
    assert "MB/s" in capsys.readouterr().out
    assert record(tmp_path / "out")["after"]["expert"] == 64
    assert main([str(bf16), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/out is not empty; choose another output\n"
    assert main([str(bf16), str(tmp_path / "new"), "--preset", "olmoe-1b-7b", "--heads", "4"]) == 1
    assert "leave out heads" in capsys.readouterr().err
    assert inflate_writer.NAME == "inflation.json"
