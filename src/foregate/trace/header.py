"""``trace.json``: which model a trace is of, what its rows hold, and the runs that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from foregate.errors import TraceError
from foregate.trace import format as fmt
from foregate.trace.fields import Fields


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The traced model. Tuples have one entry a MoE layer, in execution order; ``moe_layers`` are decoder layers.

    ``tokenizer`` is a fingerprint too, empty where there is none.
    """

    name: str
    fingerprint: str
    model_type: str
    dtype: str
    hidden_size: int
    moe_layers: tuple[int, ...]
    experts_per_layer: tuple[int, ...]
    top_k: tuple[int, ...]
    tokenizer: str = ""

    @property
    def layers(self) -> int:
        """L, MoE layers."""
        return len(self.experts_per_layer)

    @property
    def width(self) -> int:
        """k, length of the expert lists: what the layer that chooses most chooses."""
        return max(self.top_k)

    @property
    def expert_dtype(self) -> str:
        return fmt.expert_dtype(max(self.experts_per_layer))


@dataclass(frozen=True, slots=True)
class FeatureInfo:
    """One kind of feature tensor, [N, *shape] a prompt; rows of layers that are not in ``layers`` are NaN."""

    dtype: str
    shape: tuple[int, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ScoreInfo:
    """Full router scores: ``width`` numbers a row (at least the experts of a layer), and what they are."""

    width: int
    kind: str


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One run that added prompts. ``source`` is engine, resident, or the name of another recorder (vllm)."""

    source: str
    software: Mapping[str, str]
    seed: int
    dataset: Mapping[str, Any]
    settings: Mapping[str, Any]
    created: str

    def same_work(self, other: RunInfo) -> bool:
        """Whether both trace the same prompts in the same way, with whatever versions of the software."""
        return replace(self, software={}, created="") == replace(other, software={}, created="")


@dataclass(frozen=True, slots=True)
class Totals:
    """What a finished trace has; written last, so that a manifest cut short is noticed."""

    prompts: int
    rows: int


@dataclass(frozen=True, slots=True)
class Header:
    """Everything that is true of the whole trace. ``complete`` is None while it is being written."""

    model: ModelInfo
    runs: tuple[RunInfo, ...]
    scores: ScoreInfo | None = None
    timings: tuple[str, ...] = ()
    features: Mapping[str, FeatureInfo] = field(default_factory=dict)
    complete: Totals | None = None

    @property
    def schema(self) -> pa.Schema:
        """Columns of every part."""
        return fmt.part_schema(self.model.expert_dtype, scores=self.scores is not None, timings=self.timings)

    @property
    def layout(self) -> str:
        """Hash of everything that the rows depend on, the model's name left out; parts carry it."""
        rows: list[Any] = [asdict(replace(self.model, name="")), self.scores and asdict(self.scores), self.timings]
        rows.append({name: asdict(info) for name, info in self.features.items()})
        return fmt.checksum(json.dumps(rows, sort_keys=True).encode())[:16]

    def to_json(self) -> bytes:
        raw = {"format": fmt.VERSION, **asdict(self), "layout": self.layout}
        return (json.dumps(raw, indent=1, ensure_ascii=False) + "\n").encode()


def read_header(directory: Path) -> Header:
    """The header of the trace in ``directory``. Raises TraceError naming the file."""
    path = directory / fmt.HEADER_FILE
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise TraceError(f"{path}: file is missing; {directory} is not a trace") from None
    except NotADirectoryError:
        raise TraceError(f"{directory} is a file; a trace is a directory") from None
    except (OSError, ValueError) as error:
        raise TraceError(f"{path}: corrupted: not JSON ({error})") from None
    return parse_header(raw, str(path))


def parse_header(raw: Any, where: str) -> Header:
    """The header in parsed JSON. Raises TraceError, naming ``where``, for an unknown version or a wrong field."""
    fields = Fields(raw, where)
    version = fields.text("format")
    if version != fmt.VERSION:
        raise TraceError(f"{where}: format {version!r} is not known; this Foregate reads {fmt.VERSION}")
    header = Header(
        model=_model(fields.sub("model")),
        runs=tuple(_run(run) for run in fields.subs("runs")),
        scores=_scores(fields.sub("scores")) if "scores" in fields else None,
        timings=fields.texts("timings", fmt.TIMINGS),
        features={name: _feature(fields.sub("features"), name) for name in fields.table("features")},
        complete=_totals(fields.sub("complete")) if "complete" in fields else None,
    )
    if header.layout != fields.text("layout"):
        raise TraceError(f"{where}: corrupted: the layout is not the one that the parts were written with")
    return header


def _model(fields: Fields) -> ModelInfo:
    model = ModelInfo(
        name=fields.text("name"),
        fingerprint=fields.text("fingerprint"),
        model_type=fields.text("model_type"),
        dtype=fields.text("dtype"),
        hidden_size=fields.count("hidden_size"),
        moe_layers=fields.counts("moe_layers"),
        experts_per_layer=fields.counts("experts_per_layer"),
        top_k=fields.counts("top_k"),
        tokenizer=fields.text("tokenizer"),
    )
    if not model.layers or not len(model.moe_layers) == len(model.top_k) == model.layers:
        raise TraceError(f"{fields.where}: moe_layers, experts_per_layer and top_k are not of the same length")
    return model


def _run(fields: Fields) -> RunInfo:
    return RunInfo(
        source=fields.text("source"),
        software=fields.table("software"),
        seed=fields.count("seed"),
        dataset=fields.table("dataset"),
        settings=fields.table("settings"),
        created=fields.text("created"),
    )


def _scores(fields: Fields) -> ScoreInfo:
    return ScoreInfo(fields.count("width"), fields.choice("kind", fmt.SCORE_KINDS))


def _feature(features: Fields, name: str) -> FeatureInfo:
    fields = features.sub(name)
    return FeatureInfo(fields.choice("dtype", fmt.FEATURE_DTYPES), fields.counts("shape"), fields.counts("layers"))


def _totals(fields: Fields) -> Totals:
    return Totals(fields.count("prompts"), fields.count("rows"))
