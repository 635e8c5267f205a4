"""Tiny checkpoints: each family loads without a missing key, routes, decodes with its cache, and never varies."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from foregate.errors import ConfigError
from foregate.testing import large
from foregate.testing.families import CONFIGS
from foregate.testing.tiny import FAMILIES, REFUSED, REQUIRED, build
from foregate.testing.tokenizer import BOS, EOS, PAD, VOCAB_SIZE

PROMPT = "The quick brown fox and the naïve 狐 of seven hills."


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices of 64 columns: a second thread only waits for the first, seconds of it when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Directory of a family's checkpoint, built at most once."""
    built: dict[str, Path] = {}

    def checkpoint(family: str) -> Path:
        if family not in built:
            built[family] = build(family, tmp_path_factory.mktemp(family))
        return built[family]

    return checkpoint


def load(directory: Path) -> tuple[Any, dict[str, Any]]:
    options = {"experts_implementation": "eager", "output_loading_info": True}
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def prompt_ids(directory: Path) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(directory)(PROMPT, return_tensors="pt").input_ids


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def experts_of(model: Any) -> list[Any]:
    """The modules that transformers dispatches through its experts interface."""
    return [module for module in model.modules() if hasattr(module, "has_gate")]


def routed(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The expert indexes [T, k] of every call of an experts module in one forward pass, in order."""
    seen: list[torch.Tensor] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [*args, *kwargs.values()]
        seen.append(next(value for value in values if torch.is_tensor(value) and not value.is_floating_point()))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in experts_of(model)]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_promised_families_are_there() -> None:
    assert len(REQUIRED) == 14
    assert set(REQUIRED) <= set(FAMILIES)
    assert not set(REFUSED) & set(FAMILIES)
    assert set(CONFIGS) == set(FAMILIES) | set(REFUSED)


def test_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match=r"'gpt_9'.*qwen3_moe"):
        build("gpt_9", Path("nowhere"))


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_cleanly_and_is_small(family: str, checkpoints: Any) -> None:
    directory = checkpoints(family)
    model, info = load(directory)
    assert not any(info.values()), info
    assert (directory / "model.safetensors").stat().st_size < 2_000_000
    assert len(experts_of(model)) >= 3 or family == "llama4_text"
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (BOS, EOS)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama4_text"])
def test_routing_is_varied_and_never_tied(family: str, checkpoints: Any) -> None:
    directory = checkpoints(family)
    model, _ = load(directory)
    ids = prompt_ids(directory)
    calls = routed(model, ids)
    assert len(calls) == len(experts_of(model))
    for chosen in calls:
        assert chosen.shape[0] == ids.shape[1]
        assert len(chosen.unique()) > chosen.shape[1]
        assert all(len(row.unique()) == chosen.shape[1] for row in chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_cache_equals_full_forward(family: str, checkpoints: Any) -> None:
    directory = checkpoints(family)
    model, _ = load(directory)
    ids = prompt_ids(directory)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 8
    with torch.no_grad():
        full = model(out, use_cache=False).logits
        step = model(out[:, :-4], use_cache=True)
        stepped = [step.logits]
        for position in range(out.shape[1] - 4, out.shape[1]):
            token = out[:, position : position + 1]
            step = model(token, past_key_values=step.past_key_values, use_cache=True)
            stepped.append(step.logits)
    assert full.isfinite().all()
    torch.testing.assert_close(torch.cat(stepped, dim=1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_is_constant(family: str, checkpoints: Any) -> None:
    """A norm of ones or a bias of zeros would hide that it is never applied."""
    model, _ = load(checkpoints(family))
    constant = [name for name, p in model.named_parameters() if p.numel() > 1 and p.min() == p.max()]
    assert not constant


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_bytes(family: str, checkpoints: Any, tmp_path: Path) -> None:
    first = digests(checkpoints(family))
    assert digests(build(family, tmp_path / "again")) == first
    assert digests(build(family, tmp_path / "other", seed=1))["model.safetensors"] != first["model.safetensors"]


def test_same_bytes_in_another_process(checkpoints: Any, tmp_path: Path) -> None:
    script = "import sys, pathlib, foregate.testing.tiny as t; t.build('jamba', pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert digests(tmp_path) == digests(checkpoints("jamba"))


def test_building_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    build("mixtral", tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_overrides_and_dtype(tmp_path: Path) -> None:
    model, _ = load(build("qwen3_moe", tmp_path, dtype="bfloat16", num_experts=32, num_hidden_layers=5))
    assert model.dtype == torch.bfloat16
    assert [module.num_experts for module in experts_of(model)] == [32] * 4


@pytest.mark.parametrize("family", REFUSED)
def test_refused_families_load_in_transformers_but_dispatch_no_experts(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build(family, tmp_path))
    assert not experts_of(model)


def test_tokenizer_survives_any_text(checkpoints: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints("mixtral"))
    ids = tokenizer(PROMPT).input_ids
    assert tokenizer.decode(ids) == PROMPT
    assert len(ids) < len(PROMPT.encode())  # merges apply
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS, EOS, PAD)
    assert len(tokenizer) < VOCAB_SIZE
    messages = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "user: hi\nassistant:"


SMALL = {"hidden": 64, "experts": 8, "expert_width": 32, "chosen": 2}


def test_large_checkpoint_loads_cleanly_and_decodes(tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    directory = large.build_large(
        tmp_path, layers=4, shard_bytes=100_000, progress=lambda *done: reports.append(done), **SMALL
    )
    assert len(list(directory.glob("*.safetensors"))) > 2
    model, info = load(directory)
    assert not any(info.values()), info
    assert reports[-1] == (2 * model.num_parameters(),) * 2
    ids = prompt_ids(directory)
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()
    assert all(len(chosen.unique()) > 2 for chosen in routed(model, ids))
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 8


def test_large_values_are_scaled_like_an_initialisation(tmp_path: Path) -> None:
    model, _ = load(large.build_large(tmp_path, layers=1, **SMALL))
    weights = model.model.layers[0].mlp.experts.gate_up_proj.float()
    assert abs(weights.mean()) < 0.01
    assert 0.7 < weights.std() * 8 < 1.4  # 8 = sqrt(64)
    norm = model.model.norm.weight
    assert norm.min() >= 1
    assert norm.max() < 1.25


def test_large_is_the_same_however_it_is_sharded(tmp_path: Path) -> None:
    one = large.build_large(tmp_path / "one", layers=2, **SMALL)
    many = large.build_large(tmp_path / "many", layers=2, shard_bytes=10_000, **SMALL)
    assert tensors_of(one).keys() == tensors_of(many).keys()
    assert all(torch.equal(value, tensors_of(many)[name]) for name, value in tensors_of(one).items())
    again = large.build_large(tmp_path / "again", layers=2, **SMALL)
    assert digests(again) == digests(one)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def test_large_reaches_the_size_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    large.main([str(tmp_path), "--gigabytes", "0.0005", *sizes])
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) > 500_000
    assert "MB/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "one of them"),
        ({"layers": 2, "total_bytes": 1000}, "one of them"),
        ({"layers": 0}, "layers=0"),
        ({"layers": 1, "hidden": 100}, "hidden=100"),
        ({"layers": 1, "chosen": 65}, "choose 65 of 64"),
        ({"total_bytes": 10**18}, "bytes free"),
    ],
)
def test_large_refuses_impossible_sizes(sizes: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        large.build_large(tmp_path, **sizes)
