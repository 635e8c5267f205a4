"""The compiled kernels against torch on the same numbers: every format, instruction set, shape, thread count."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from foregate.checkpoint.expand import expanded
from foregate.checkpoint.quantise import SCALE, Scheme, dequantised, parse_scheme, quantised, scheme_of, stored
from foregate.errors import ConfigError
from foregate.experts.compute import Weights, expert_forward, experts_forward, runs_fused, torch_forward
from foregate.experts.kernel_speed import KINDS, kernel_speed
from foregate.native import kernels, library
from foregate.native.library import load
from foregate.types import ParamLayout

FORMATS = ("bf16", "int8", "int4/32", "int4/64", "int4/128")
SHAPES = ((64, 32), (256, 64), (100, 36), (37, 19), (1100, 272), (8, 4))
LEVELS = {0: "portable", 1: "avx2", 2: "avx512-vnni"}
TOLERANCE = 3e-4
"""Largest error, relative to the largest output, with float32 inputs: 15-bit inputs cost 2 ** -16 of their largest,
which between the matrices is ten times the usual one."""

needs_kernels = pytest.mark.skipif(kernels.library() is None, reason="the compiled kernels were not built")


class Experts(nn.Module):
    """What transformers' decorator makes of a plain family's experts."""

    has_gate = is_concatenated = True
    is_transposed = has_bias = False
    _apply_gate = _default_apply_gate

    def __init__(self, hidden: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(1, 2 * width, hidden, device="meta", dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(1, hidden, width, device="meta", dtype=dtype))
        self.act_fn = nn.SiLU()


def expert(hidden: int, width: int, kind: str, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The stored tensors of one random expert, and the numbers that they stand for in float32."""
    maker = torch.Generator().manual_seed(seed)
    shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    held: dict[str, Tensor] = {}
    numbers: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=maker) / shape[1] ** 0.5
        if kind == "bf16":
            held[name] = weight.bfloat16()
            numbers[name] = held[name].float()
        else:
            made = dict(quantised(name, weight, parse_scheme(kind)))
            held |= made
            numbers[name] = dequantised(name, made[name], made[name + SCALE], shape)
    return held, numbers


def inputs(tokens: int, hidden: int, seed: int = 1) -> Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=sorted(LEVELS))
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine has, one after another."""
    found = kernels.library()
    assert found is not None
    name = found.foregate_kernels(request.param).decode()
    if name != LEVELS[request.param]:
        pytest.skip(f"this processor has no {LEVELS[request.param]}")
    yield name
    found.foregate_kernels(2)


@needs_kernels
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_torch_in_every_format_and_shape(kind: str, shape: tuple[int, int], level: str) -> None:
    module, (held, numbers) = Experts(*shape), expert(*shape, kind)
    for tokens in (1, 3, kernels.MOST_TOKENS):
        x = inputs(tokens, shape[0])
        wanted = torch_forward(module, x, numbers)
        assert runs_fused(module, x, Weights(held))
        error = (expert_forward(module, x, Weights(held)) - wanted).abs().max() / wanted.abs().max()
        assert error < (2e-6 if kind == "bf16" else TOLERANCE), f"{level}: {tokens} tokens"


@needs_kernels
@pytest.mark.parametrize("kind", FORMATS)
def test_bfloat16_inputs_and_outputs(kind: str, level: str) -> None:
    module, (held, numbers) = Experts(256, 64), expert(256, 64, kind)
    x = inputs(3, 256).bfloat16()
    out, wanted = expert_forward(module, x, Weights(held)), torch_forward(module, x.float(), numbers)
    assert out.dtype == torch.bfloat16
    assert (out.float() - wanted).abs().max() <= wanted.abs().max() * 2**-8


@needs_kernels
@pytest.mark.parametrize("kind", FORMATS)
def test_threads_and_other_tokens_change_no_bit(kind: str, level: str) -> None:
    module, (held, _) = Experts(384, 200), expert(384, 200, kind)
    x, before = inputs(8, 384), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(expert_forward(module, x, Weights(held)))
    finally:
        torch.set_num_threads(before)
    alone = torch.cat([expert_forward(module, row[None], Weights(held)) for row in x])
    assert all(torch.equal(result, alone) for result in results)


def together(module: Experts, x: Tensor, held: list[Weights]) -> Tensor:
    """Their rows are written from the last on, and no other."""
    out = x.new_full((len(held) + 1, x.shape[1]), 7.0)
    experts_forward(module, x, held, out, range(len(held), 0, -1))
    assert (out[0] == 7.0).all()
    return out[1:].flip(0)


@needs_kernels
@pytest.mark.parametrize("kind", FORMATS)
def test_experts_together_have_the_bits_of_one_by_one(kind: str, level: str) -> None:
    module, x = Experts(256, 64), torch.randn(1, 256, generator=torch.Generator().manual_seed(3))
    held = [Weights(expert(256, 64, kind, seed)[0]) for seed in range(5)]
    for given in (x, x.bfloat16()):
        alone = torch.cat([expert_forward(module, given, one) for one in held])
        for threads in (1, 2):
            kernels.use_threads(threads)
            try:
                assert torch.equal(together(module, given, held), alone)
            finally:
                kernels.use_threads(None)


@needs_kernels
def test_experts_of_different_forms_are_computed_one_by_one() -> None:
    module, x = Experts(256, 64), torch.randn(1, 256, generator=torch.Generator().manual_seed(3))
    held = [Weights(expert(256, 64, kind)[0]) for kind in FORMATS]
    assert torch.equal(together(module, x, held), torch.cat([expert_forward(module, x, one) for one in held]))


@needs_kernels
def test_int8_is_the_same_bits_on_every_instruction_set() -> None:
    """Its sums are integers; only the activation between the matrices is not."""
    found = kernels.library()
    assert found is not None
    held, _ = expert(300, 70, "int8")
    results = []
    for level in LEVELS:
        found.foregate_kernels(level)
        matrix = kernels.matrix(held["down_proj"], held["down_proj" + SCALE])
        results.append(kernels.linear(matrix, inputs(2, 70), 300))
    assert all(torch.equal(result, results[0]) for result in results)


@needs_kernels
def test_unaligned_weights_at_the_very_end_of_memory_are_not_overread() -> None:
    """A slot's last byte may be the last byte of a mapping: reading beyond it would kill the process."""
    import mmap

    held, _ = expert(37, 19, "int8")
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    flat = torch.frombuffer(memory, dtype=torch.int8)
    down = flat[len(flat) - held["down_proj"].numel() :].view(held["down_proj"].shape)
    down.copy_(held["down_proj"])
    at_the_end = {**held, "down_proj": down}
    module, x = Experts(37, 19), inputs(2, 37)
    assert torch.equal(expert_forward(module, x, Weights(at_the_end)), expert_forward(module, x, Weights(held)))


@needs_kernels
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_inputs_are_not_hidden(kind: str, value: float, level: str) -> None:
    module, (held, _) = Experts(64, 32), expert(64, 32, kind)
    x = inputs(2, 64)
    x[1, 5] = value
    out = expert_forward(module, x, Weights(held))
    assert out[0].isfinite().all()
    assert not out[1].isfinite().any()


@needs_kernels
@pytest.mark.parametrize("kind", FORMATS)
def test_zero_huge_and_tiny_inputs(kind: str, level: str) -> None:
    module, (held, numbers) = Experts(64, 32), expert(64, 32, kind)
    assert not expert_forward(module, torch.zeros(1, 64), Weights(held)).any()
    for size in (1e-10, 1e4):
        x = inputs(1, 64) * size
        wanted = torch_forward(module, x, numbers)
        error = (expert_forward(module, x, Weights(held)) - wanted).abs().max()
        assert error <= wanted.abs().max() * TOLERANCE


@needs_kernels
@pytest.mark.parametrize("kind", ["int8", "int4/32"])
def test_many_tokens_see_the_same_weights_as_few(kind: str, level: str) -> None:
    """More than MOST_TOKENS: taken apart to bf16 and multiplied by torch."""
    module, (held, numbers) = Experts(256, 64, torch.bfloat16), expert(256, 64, kind)
    wanted = torch_forward(module, inputs(20, 256), numbers)
    out = expert_forward(module, inputs(20, 256).bfloat16(), Weights(held))
    assert (out.float() - wanted).abs().max() < wanted.abs().max() * 0.02
    for name in ("gate_up_proj", "down_proj"):
        pair = held[name], held[name + SCALE]
        shape = tuple(numbers[name].shape)
        assert torch.equal(expanded(name, *pair, shape, torch.bfloat16), numbers[name].bfloat16())


@needs_kernels
def test_calls_from_several_threads_do_not_meet() -> None:
    module, (held, _) = Experts(512, 256), expert(512, 256, "int8")
    before = torch.get_num_threads()
    wanted = expert_forward(module, inputs(1, 512), Weights(held))
    wrong: list[int] = []

    def call() -> None:
        weights = Weights(held)
        wrong.extend(i for i in range(100) if not torch.equal(expert_forward(module, inputs(1, 512), weights), wanted))

    torch.set_num_threads(2)
    try:
        callers = [threading.Thread(target=call) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(before)
    assert wrong == []


IDLE_AND_FORK = """
import os, time, torch
from foregate.native import kernels
torch.set_num_threads(3)
weights = torch.ones(256, 512, dtype=torch.bfloat16)
matrix, x = kernels.matrix(weights, None), torch.ones(1, 512)
before = kernels.linear(matrix, x, 256)
time.sleep(0.05)
began = time.process_time()
time.sleep(0.3)
assert time.process_time() - began < 0.05, "idle threads take time"
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(kernels.linear(matrix, x, 256), before) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child computes something else"
assert torch.equal(kernels.linear(matrix, x, 256), before)
"""


@needs_kernels
def test_threads_sleep_when_idle_and_a_forked_child_gets_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", IDLE_AND_FORK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_without_kernels_torch_computes() -> None:
    code = "from foregate.native import kernels; assert kernels.library() is None; print(kernels.instructions())"
    env = {**os.environ, "FOREGATE_NATIVE": "off"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert (done.returncode, done.stdout.strip()) == (0, "torch"), done.stderr


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("is_transposed", True),
        ("has_bias", True),
        ("is_concatenated", False),
        ("has_gate", False),
        ("act_fn", nn.GELU()),
    ],
)
def test_unusual_modules_go_through_torch(attribute: str, value: object) -> None:
    module = Experts(64, 32)
    setattr(module, attribute, value)
    assert not runs_fused(module, inputs(1, 64), Weights(expert(64, 32, "int8")[0]))


@needs_kernels
@pytest.mark.parametrize(("columns", "fused"), [(65536, True), (65664, False)])
def test_rows_whose_integer_sums_could_overflow_go_through_torch(columns: int, fused: bool) -> None:
    module, (held, numbers) = Experts(columns, 1), expert(columns, 1, "int4/128")
    x = torch.ones(1, columns)
    assert runs_fused(module, x, Weights(held)) == fused
    wanted = torch_forward(module, x, numbers)
    assert (expert_forward(module, x, Weights(held)) - wanted).abs().max() <= wanted.abs().max() * TOLERANCE


@needs_kernels
def test_the_longest_row_of_the_largest_integers_does_not_overflow(level: str) -> None:
    weight = torch.ones(3, kernels.MOST_COLUMNS)
    weight[1] *= -1
    made = dict(quantised("down_proj", weight, parse_scheme("int8")))
    out = kernels.linear(kernels.matrix(*made.values()), torch.ones(1, kernels.MOST_COLUMNS), 3)
    assert out.tolist() == [[pytest.approx(s * kernels.MOST_COLUMNS, rel=1e-5) for s in (1, -1, 1)]]


def test_odd_dtypes_go_through_torch() -> None:
    held, numbers = expert(64, 32, "bf16")
    assert not runs_fused(Experts(64, 32), inputs(1, 64), Weights(numbers))
    assert not runs_fused(Experts(64, 32), inputs(1, 64).half(), Weights(held))


@pytest.mark.parametrize("kind", FORMATS[1:])
@pytest.mark.parametrize("transposed", [False, True])
def test_quantising_loses_little_and_nothing_in_size(kind: str, transposed: bool) -> None:
    scheme, shape = parse_scheme(kind), (72, 100)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    made = quantised("gate_up_proj", weight, scheme, transposed)
    described = stored("gate_up_proj", "F32", shape, scheme, transposed)
    assert [tuple(tensor.shape) for _, tensor in made] == [item[2] for item in described]
    back = dequantised("gate_up_proj", made[0][1], made[1][1], shape, transposed)
    assert (back - weight).square().mean() < (1.2e-4 if scheme.bits == 8 else 1.2e-2)
    values, scales = (ParamLayout(name, dtype, s, 0, 0) for name, dtype, s in described)
    assert scheme_of(values, scales) == scheme


def test_scheme_names() -> None:
    assert parse_scheme("int4") == Scheme(4, 32)
    assert parse_scheme("int4", 64).name == "int4/64"
    assert parse_scheme("source") == Scheme()
    for text, group in (("int7", None), ("int8", 32), ("int4", 48), ("int4/64", 64), ("int4/x", None)):
        with pytest.raises(ConfigError):
            parse_scheme(text, group)


@pytest.mark.parametrize("kind", KINDS)
def test_speed_is_of_all_weight_bytes(kind: str) -> None:
    """Scales included, padding not. How fast that is, only a quiet machine tells."""
    found = kernel_speed(kind, threads=1, hidden=512, width=256, memory_bytes=8 << 20, rounds=3)
    bytes_per_weight = {"bf16": 2, "int8": 1, "int4/32": 0.5 + 2 / 32, "int4/64": 0.5 + 2 / 64}[kind]
    assert found.expert_bytes == pytest.approx(3 * 512 * 256 * bytes_per_weight, rel=0.02)
    assert found.gb_per_s == pytest.approx(found.expert_bytes / found.expert_us / 1e3)
    assert found.share == pytest.approx(found.gb_per_s / found.read_gb_per_s) != 0


@needs_kernels
def test_a_library_of_an_older_source_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert load("kernels", ["foregate_linear", "foregate_of_tomorrow"]) is None
    assert "older source (no foregate_of_tomorrow)" in caplog.text
    assert load("kernels", kernels.FUNCTIONS) is not None


@needs_kernels
def test_a_library_whose_functions_take_other_arguments_is_left_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "VERSION", "foregate_version_of_yesterday")
    assert load("kernels", kernels.FUNCTIONS) is None
    assert "older source (no foregate_version_of_yesterday)" in caplog.text
