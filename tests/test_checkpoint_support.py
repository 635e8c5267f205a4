"""What the checkpoint, pack and store tests share, and the proof that their comparison can fail.

Shapes: E experts of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from foregate.checkpoint import manifest as manifests
from foregate.checkpoint.dtypes import FLOATS
from foregate.checkpoint.opening import Checkpoint, open_checkpoint
from foregate.experts.store import open_store
from foregate.interfaces import ExpertStore
from foregate.testing.tiny import build, no_progress_bar
from foregate.types import ExpertKey

Tensors = dict[str, torch.Tensor]


def tiny(directory: Path, family: str = "olmoe", **options: Any) -> Path:
    """A seeded tiny checkpoint in bfloat16: about 1 MB, small enough to build in every test."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know {family}")
    return build(family, directory, **{"dtype": "bfloat16", **options})


def edit_tensors(directory: Path, edit: Callable[[Tensors], Tensors], name: str = "model.safetensors") -> None:
    """Rewrite a weight file."""
    path = directory / name
    save_file({k: v.contiguous() for k, v in edit(load_file(path)).items()}, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    content = {**json.loads(path.read_text()), **changes}
    gone = [key for key, value in changes.items() if value is None]
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in gone}))


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file and no weight."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def edit_manifest(packed: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of a pack and make its checksum match: what only the other checks can find."""
    path = packed / manifests.NAME
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(manifests.signed({key: value for key, value in content.items() if key != manifests.CHECKSUM}))


def flip(path: Path, offset: int) -> None:
    """Change one bit."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def load(directory: Path) -> Any:
    """The model as transformers itself loads it: what every slot is compared with."""
    with no_progress_bar():
        return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


def keys(checkpoint: Checkpoint) -> list[ExpertKey]:
    return [ExpertKey(layer, e) for layer, count in enumerate(checkpoint.spec.experts_per_layer) for e in range(count)]


def read_slot(store: ExpertStore, key: ExpertKey, slot: mmap) -> bytes:
    """All of one expert's slot. The slot is filled with ones before, so that padding that nobody writes is seen."""
    slot[:] = b"\xff" * len(slot)
    with memoryview(slot) as view:
        read = store.begin(key, view)
        for index in reversed(range(read.chunks)):
            read.read(index)
        read.finish()
    return slot[: store.layout(key.layer).nbytes]


def slots(checkpoint: Checkpoint, chunk_bytes: int = 4096) -> dict[ExpertKey, bytes]:
    """Every expert through the checkpoint's store, in small chunks."""
    store = open_store(checkpoint, chunk_bytes)
    slot = mmap(-1, store.slot_bytes)
    try:
        return {key: read_slot(store, key, slot) for key in keys(checkpoint)}
    finally:
        store.close()
        slot.close()


def differences(checkpoint: Checkpoint, model: Any, found: dict[ExpertKey, bytes]) -> list[str]:
    """Parameters of experts whose bytes in the slots are not those of the loaded ``model``."""
    wrong = []
    for key, content in found.items():
        module = model.get_submodule(checkpoint.spec.module_paths[key.layer])
        for param in checkpoint.layouts[key.layer].params:
            wanted = getattr(module, param.name)[key.expert]
            raw = bytearray(content[param.offset : param.offset + param.nbytes])
            got = torch.frombuffer(raw, dtype=FLOATS[param.dtype]).view(param.shape)
            if got.dtype != wanted.dtype or not torch.equal(got, wanted):
                wrong.append(f"{key} {param.name}")
    return wrong


def check_against_transformers(directory: Path) -> Checkpoint:
    """Every expert of ``directory``, read directly, is bit for bit what transformers loads."""
    checkpoint = open_checkpoint(directory)
    found = slots(checkpoint)
    assert len(found) == checkpoint.spec.experts
    assert differences(checkpoint, load(directory), found) == []
    return checkpoint


def test_the_comparison_sees_one_flipped_bit(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny(tmp_path))
    found = slots(checkpoint)
    key = ExpertKey(1, 3)
    damaged = bytearray(found[key])
    damaged[checkpoint.layouts[1].params[1].offset] ^= 1
    found[key] = bytes(damaged)
    assert differences(checkpoint, load(tmp_path), found) == [f"{key} down_proj"]


@pytest.mark.parametrize("chunk_bytes", [0, -4096, 5000])
def test_chunks_that_are_no_blocks_are_refused(tmp_path: Path, chunk_bytes: int) -> None:
    from foregate.errors import CheckpointError

    with pytest.raises(CheckpointError, match=str(chunk_bytes)):
        open_store(open_checkpoint(tiny(tmp_path)), chunk_bytes)
