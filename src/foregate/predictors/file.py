"""The predictor file: one safetensors file of named arrays, with everything else as JSON in its metadata. No torch.

Shapes: L MoE layers, E experts of a layer, D hidden size. Same content, same bytes: nothing in it tells the time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from foregate import __version__
from foregate.checkpoint.jsonfile import parse
from foregate.errors import PredictorError, TraceError
from foregate.trace.durable import write_file
from foregate.trace.fields import Fields
from foregate.trace.header import ModelInfo

FORMAT = "foregate-predictor-1"
KEY = "foregate"
"""Name of the metadata entry that holds the JSON."""

LICENCE = "Apache-2.0"


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model: by fingerprint, and by the sizes that a predictor depends on.

    ``original`` is the fingerprint of the model that this one was inflated from, empty if it was not: an inflated copy
    routes every token as its original does, and its hidden vectors begin with the original's D values.
    """

    name: str
    fingerprint: str
    experts: tuple[int, ...]
    top_k: int
    hidden_size: int
    original: str = ""

    @classmethod
    def of_trace(cls, model: ModelInfo) -> ModelIdentity:
        """That of a traced model."""
        return cls(model.name, model.fingerprint, model.experts_per_layer, model.width, model.hidden_size)

    @property
    def layers(self) -> int:
        """L, MoE layers."""
        return len(self.experts)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A trained (or counted) predictor as a file holds it.

    ``options`` are the method's own; ``features`` the signals that it was fitted on; ``metrics`` what fitting reported;
    ``traces`` the names of the training traces and ``trace_hash`` the hash of their content; ``prompts`` the hashes of
    every prompt that fitting saw, validation included (older files: empty).
    """

    method: str
    model: ModelIdentity
    lookahead: int
    arrays: Mapping[str, NDArray[Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    traces: tuple[str, ...] = ()
    trace_hash: str = ""
    prompts: tuple[str, ...] = ()
    seed: int = 0
    licence: str = LICENCE
    version: str = __version__
    path: str = ""

    def array(self, name: str, shape: tuple[int | None, ...], kind: str = "f") -> NDArray[Any]:
        """Array ``name``; None in ``shape`` fits any length, ``kind`` is numpy's (``f`` float, ``iu`` integers).

        Raises PredictorError where it is missing, of another shape or kind, or has a value that is not finite.
        """
        found = self.arrays.get(name)
        if found is None:
            raise PredictorError(f"{self._where}: array {name!r} is missing")
        if len(found.shape) != len(shape) or any(n not in (None, m) for n, m in zip(shape, found.shape, strict=True)):
            raise PredictorError(f"{self._where}: array {name!r} has shape {found.shape}, not {_spelled(shape)}")
        if found.dtype.kind not in kind:
            raise PredictorError(f"{self._where}: array {name!r} has dtype {found.dtype}")
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise PredictorError(f"{self._where}: array {name!r} has values that are not finite")
        return found

    def option(self, name: str, kind: type[Any]) -> Any:
        """Option ``name``, of type ``kind`` (an int passes for a float). Raises PredictorError otherwise."""
        value = self.options.get(name)
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise PredictorError(f"{self._where}: option {name!r} is {value!r}, no {kind.__name__}")
        return value

    def check_model(self, model: ModelIdentity) -> None:
        """Raises PredictorError, naming both, unless the predictor was made for ``model`` or for its original."""
        ours = self.model
        if ours.fingerprint not in (model.fingerprint, model.original):
            raise PredictorError(
                f"{self._where}: made for {ours.name} (fingerprint {ours.fingerprint[:12]}), not for {model.name} "
                f"({model.fingerprint[:12]}{', inflated from ' + model.original[:12] if model.original else ''})"
            )
        sizes, theirs = (ours.experts, ours.top_k), (model.experts, model.top_k)
        if sizes != theirs or not 0 < ours.hidden_size <= model.hidden_size:
            raise PredictorError(
                f"{self._where}: made for experts per layer {ours.experts}, top-{ours.top_k}, hidden size "
                f"{ours.hidden_size}; {model.name} has {model.experts}, top-{model.top_k}, {model.hidden_size}"
            )

    def as_dict(self) -> dict[str, Any]:
        """JSON form: everything but the values, of which it gives shapes and dtypes; of ``prompts`` their number."""
        raw: dict[str, Any] = asdict(replace(self, arrays={}, prompts=()))
        raw["prompts"] = len(self.prompts)
        raw["arrays"] = {name: [str(a.dtype), *a.shape] for name, a in sorted(self.arrays.items())}
        raw["parameters"] = sum(a.size for a in self.arrays.values())
        return raw

    @property
    def _where(self) -> str:
        return self.path or f"predictor {self.method!r}"


def save(path: Path | str, artifact: Artifact) -> None:
    """Write ``artifact``, whole or not at all. Raises PredictorError where the disk is full or the like."""
    raw = asdict(replace(artifact, arrays={}))
    del raw["arrays"], raw["path"]
    header = json.dumps({"format": FORMAT, **raw}, sort_keys=True)
    # safetensors writes the memory as it lies: other strides would come back scrambled
    arrays = {name: np.ascontiguousarray(value) for name, value in artifact.arrays.items()}
    try:
        write_file(Path(path), serialise(arrays, {KEY: header}))
    except TraceError as error:
        raise PredictorError(str(error)) from error


def load(path: Path | str) -> Artifact:
    """The artifact in ``path``. Raises PredictorError, in one line naming it, if there is none or it is damaged."""
    where = str(path)
    try:
        with safe_open(where, framework="np") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise PredictorError(f"{where}: a safetensors file, but no predictor of Foregate")
            # a copy: the file may be replaced under the map
            arrays = {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise PredictorError(f"{where}: no such predictor file") from None
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        raise PredictorError(f"{where}: damaged, or no predictor file ({error})") from error
    try:
        return _parse(parse(metadata[KEY].encode()), arrays, where)
    except (TraceError, ValueError) as error:
        raise PredictorError(f"{where}: damaged: {str(error).removeprefix(where + ': ')}") from error


def _parse(raw: Any, arrays: Mapping[str, NDArray[Any]], where: str) -> Artifact:
    fields = Fields(raw, where)
    if fields.text("format") != FORMAT:
        raise PredictorError(f"{where}: format {fields.text('format')!r} is not known; this Foregate reads {FORMAT}")
    model = fields.sub("model")
    return Artifact(
        method=fields.text("method"),
        model=ModelIdentity(
            name=model.text("name"),
            fingerprint=model.text("fingerprint"),
            experts=model.counts("experts"),
            top_k=model.count("top_k"),
            hidden_size=model.count("hidden_size"),
            original=model.text("original"),
        ),
        lookahead=fields.count("lookahead"),
        arrays=arrays,
        options=fields.table("options"),
        features=_texts(raw, "features", where),
        metrics=fields.table("metrics"),
        traces=_texts(raw, "traces", where),
        trace_hash=fields.text("trace_hash"),
        prompts=_texts(raw, "prompts", where) if "prompts" in raw else (),
        seed=fields.count("seed"),
        licence=fields.text("licence"),
        version=fields.text("version"),
        path=where,
    )


def _texts(raw: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    values = raw.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TraceError(f"{where}: {name} is {values!r}, not a list of names")
    return tuple(values)


def _spelled(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('*' if n is None else str(n) for n in shape)})"
