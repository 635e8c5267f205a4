"""The program that lets transformers and accelerate offload a model to a directory once: ``… MODEL OUT``.

What transformers fuses (all experts of a layer in one tensor) is written to OUT by transformers itself; what it keeps
as it is stays in MODEL. The index of both is kept, so that runs need not write gigabytes again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from foregate.bench.rivals.disk_offload import INDEX
from foregate.checkpoint.locate import locate
from foregate.errors import CheckpointError, ForegateError


def offload(model_dir: Path, out: Path) -> None:
    """Offload ``model_dir`` to ``out``, bf16; nothing to do if that is done. Raises CheckpointError."""
    if (out / INDEX).is_file():
        if json.loads((out / INDEX).read_bytes())["model"] != str(model_dir):
            raise CheckpointError(f"{out} holds another model; remove it or choose another directory")
        return
    shutil.rmtree(out, ignore_errors=True)
    try:
        index = _write(model_dir, out)
    except (OSError, ValueError, KeyError) as error:
        shutil.rmtree(out, ignore_errors=True)
        raise CheckpointError(f"{model_dir}: {error}") from error
    (out / INDEX).write_text(json.dumps({"model": str(model_dir), "index": index}))


def _write(model_dir: Path, out: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.bfloat16, device_map={"model": "disk", "lm_head": "disk"}, offload_folder=str(out)
    )
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    maps = (getattr(hook, "weights_map", None) for hook in hooks)
    return next(dict(found.dataset.index) for found in maps if found is not None)


if __name__ == "__main__":
    try:
        offload(locate(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
    except ForegateError as error:
        sys.exit(f"error: {error}")
