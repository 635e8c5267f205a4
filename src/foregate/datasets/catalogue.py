"""From what a user types after ``--dataset`` to prompts: a known name, a file, or the id of a data set on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from foregate.datasets.benchmarks import gsm8k, humaneval, mmlu
from foregate.datasets.files import open_file, prompts_of, sharegpt
from foregate.datasets.prompt import Dataset, DatasetError, make_dataset
from foregate.datasets.rows import hub_rows, json_rows
from foregate.datasets.synthetic import synthetic

BENCHMARKS = {"humaneval": humaneval, "gsm8k": gsm8k, "mmlu": mmlu}
NAMES = (*BENCHMARKS, "sharegpt", "synthetic")
SHAREGPT_HUB = ("anon8231489123/ShareGPT_Vicuna_unfiltered", "ShareGPT_V3_unfiltered_cleaned_split.json")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_dataset(
    name: str,
    *,
    data_dir: Path | None = None,
    split: str | None = None,
    domain: str | None = None,
    seed: int = 0,
) -> Dataset:
    """The data set ``name``: one of NAMES, a file, or a hub id (owner/name).

    ``data_dir`` holds local copies. ``seed`` is for ``synthetic`` alone. Raises DatasetError, which lists the choices,
    and for an option that this data set cannot honour.
    """
    path = Path(name).expanduser()
    on_hub = name not in NAMES and not path.is_file() and _HUB_ID.fullmatch(name) is not None
    _check_options(name, data_dir, split, domain, on_hub=on_hub)
    if name in BENCHMARKS:
        return BENCHMARKS[name](data_dir, split or "test")
    if name == "synthetic":
        return synthetic(seed)
    if name == "sharegpt":
        return _sharegpt(data_dir)
    if path.is_file():
        return open_file(path, domain)
    if on_hub:
        rows = hub_rows(name, None, split or "test")
        return make_dataset("hub", prompts_of(rows, name.split("/")[1], domain, name), name, split=split or "test")
    raise DatasetError(f"no data set {name!r}: give a file, a hub id (owner/name), or one of {', '.join(NAMES)}")


def _check_options(name: str, data_dir: Path | None, split: str | None, domain: str | None, *, on_hub: bool) -> None:
    if data_dir is not None and not data_dir.is_dir():
        raise DatasetError(f"{data_dir}: no such directory")
    if data_dir is not None and name not in (*BENCHMARKS, "sharegpt"):
        raise DatasetError(f"data set {name!r} is not looked up in a directory; leave --data-dir {data_dir} out")
    if split is not None and name not in BENCHMARKS and not on_hub:
        raise DatasetError(f"data set {name!r} has no splits; leave --split {split} out")
    if domain is not None and name in NAMES:
        raise DatasetError(f"data set {name!r} has a domain of its own; leave --domain {domain} out")


def _sharegpt(data_dir: Path | None) -> Dataset:
    files = sorted(path for path in data_dir.glob("*.json") if "sharegpt" in path.name.lower()) if data_dir else []
    if data_dir is not None and not files:
        raise DatasetError(f"sharegpt is not in {data_dir}: expected a JSON file with sharegpt in its name")
    path = files[0] if files else _download_sharegpt()
    return make_dataset("sharegpt", sharegpt(json_rows(path), str(path)), path.name)


def _download_sharegpt() -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    repository, file = SHAREGPT_HUB
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DatasetError(f"{repository} cannot be had from the hub; give --data-dir: {reason}") from error
