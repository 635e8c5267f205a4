"""What is generated while time is taken: a few real prompts of each domain, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foregate.datasets.catalogue import open_dataset
from foregate.errors import ConfigError

BUILT_IN = {
    "mathematics": "Question: Natalia sold 48 clips in April and half as many in May. "
    "How many clips did she sell in all?\nAnswer:",
    "code": "def read_settings(path, default=None):\n"
    '    """Read a settings file and return its values as a dictionary."""\n',
    "prose": "The install command copies files to their final place. It takes the name of a directory and",
}
"""Used where no data set is named: nothing has to be downloaded."""


def load_prompts(engine_encode: Any, datasets: Sequence[str], data_dir: Path | None, each: int) -> dict[str, list[int]]:
    """Name → token ids: ``each`` prompts of every data set, or the built-in ones. Raises ConfigError for none."""
    texts = dict(BUILT_IN) if not datasets else {}
    for name in datasets:
        local = data_dir if name in ("gsm8k", "mmlu") else None
        found = open_dataset(name, data_dir=local)
        texts |= {f"{prompt.domain}/{prompt.id}": prompt.text for prompt in found.prompts[:each]}
    if not texts:
        raise ConfigError(f"data sets {', '.join(datasets)} have no prompts")
    return {name: engine_encode(text) for name, text in texts.items()}
