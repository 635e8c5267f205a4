"""Naming, layout, both stores and packing on every family, against what transformers itself loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from foregate.checkpoint.opening import open_checkpoint
from foregate.checkpoint.pack import pack
from foregate.checkpoint.verify import verify
from foregate.testing.tiny import FAMILIES, REQUIRED
from test_checkpoint_support import check_against_transformers, differences, load, slots, tiny


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REQUIRED])
def test_every_expert_is_what_transformers_loads(family: str, tmp_path: Path) -> None:
    check_against_transformers(tiny(tmp_path, family))


@pytest.mark.parametrize("family", [*REQUIRED, "inkling2_text", "llama4_text"])
def test_a_pack_is_the_same_as_the_original(family: str, tmp_path: Path) -> None:
    directory = tiny(tmp_path / "original", family)
    original = open_checkpoint(directory)
    direct = slots(original)
    assert differences(original, load(directory), direct) == []

    pack(directory, tmp_path / "packed")
    packed = open_checkpoint(tmp_path / "packed")
    assert slots(packed) == direct
    assert packed.spec == original.spec
    assert packed.fingerprint == original.fingerprint
    assert packed.layouts == original.layouts
    assert packed.dense.keys() == original.dense.keys()
    assert verify(tmp_path / "packed", directory).experts == original.spec.experts


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v4", "afmoe"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(family: str, dtype: str, tmp_path: Path) -> None:
    """float16 is where families keep some weights in float32."""
    directory = tiny(tmp_path, family, dtype=dtype)
    checkpoint = open_checkpoint(directory)
    assert differences(checkpoint, load(directory), slots(checkpoint)) == []


@pytest.mark.parametrize("family", ["olmoe", "ernie4_5_moe", "deepseek_v4", "gemma4_text"])
def test_dense_bytes_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    """Tied embeddings once, weights kept in float32 with four bytes."""
    checkpoint = open_checkpoint(tiny(tmp_path, family))
    model = load(tmp_path)
    modules = [model.get_submodule(path) for path in checkpoint.spec.module_paths]
    names = [[param.name for param in layout.params] for layout in checkpoint.layouts]
    experts = {id(getattr(m, name)) for m, params in zip(modules, names, strict=True) for name in params}
    dense = {id(t): t for t in model.state_dict(keep_vars=True).values() if id(t) not in experts}
    assert checkpoint.spec.dense_bytes == sum(t.numel() * t.element_size() for t in dense.values())
