"""foregate.json: what a pack holds, of what, and the checksum of every expert. Writes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from foregate.checkpoint.jsonfile import parse
from foregate.checkpoint.packorder import Orders
from foregate.checkpoint.precision import AS_SOURCE, Precision
from foregate.errors import PackError
from foregate.types import ExpertKey, ExpertLayout, ParamLayout

NAME = "foregate.json"
EXPERTS_FILE = "experts.safetensors"
DENSE_FILE = "model.safetensors"
FORMAT = "foregate-pack"
PLAIN_VERSION, VERSION = 1, 2
"""1: every weight as the source has it. 2: with ``precision``. A plain pack is still written as 1."""
CHECKSUM = "xxh3_128"
"""Key of the checksum over all other keys."""


@dataclass(frozen=True, slots=True)
class PackedExpert:
    """Where one expert lies in the experts file (bytes), and the xxh3_128 of those bytes, padding included."""

    offset: int
    nbytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One MoE layer: its module path, the slot layout of its experts, and the experts by id.

    ``order`` is theirs in the file; empty: by id too. Experts in ``kept`` have ``kept_layout``, which is ``layout``
    where there are none in the whole pack.
    """

    path: str
    layout: ExpertLayout
    experts: tuple[PackedExpert, ...]
    kept_layout: ExpertLayout
    kept: tuple[int, ...] = ()
    order: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """A finished pack. ``fingerprint`` is the original checkpoint's; ``dtype`` as safetensors spells it."""

    fingerprint: str
    dtype: str
    experts_nbytes: int
    dense_nbytes: int
    dense_checksum: str
    layers: tuple[PackedLayer, ...]
    foregate_version: str
    transformers_version: str
    precision: Precision = AS_SOURCE

    def layout_of(self, key: ExpertKey) -> ExpertLayout:
        """The slot layout of ``key``."""
        layer = self.layers[key.layer]
        return layer.kept_layout if key in self.precision.kept_experts else layer.layout

    def find(self, key: ExpertKey) -> PackedExpert:
        """Where ``key`` lies. Raises IndexError for a key that the model does not have."""
        experts = self.layers[key.layer].experts
        if not 0 <= key.expert < len(experts):
            raise IndexError(f"MoE layer {key.layer} has no expert {key.expert}, only {len(experts)}")
        return experts[key.expert]

    def order(self) -> Iterator[ExpertKey]:
        """Every expert, in the order of the file."""
        for layer, order in enumerate(self.orders):
            for expert in order:
                yield ExpertKey(layer, expert)

    @property
    def orders(self) -> Orders:
        """Of every layer, its experts in file order."""
        return tuple(layer.order or tuple(range(len(layer.experts))) for layer in self.layers)

    def to_json(self) -> str:
        """The text of foregate.json; the same manifest gives the same bytes."""
        layers = [
            {
                "path": layer.path,
                "slot_bytes": layer.layout.nbytes,
                "params": [asdict(param) for param in layer.layout.params],
                "experts": [[e.offset, e.nbytes, e.checksum] for e in layer.experts],
                **self._kept(layer),
                **({"order": list(layer.order)} if layer.order else {}),
            }
            for layer in self.layers
        ]
        precision = {} if self.precision.plain else {"precision": self.precision.to_json()}
        content = {
            "format": FORMAT,
            "version": VERSION if precision else PLAIN_VERSION,
            "fingerprint": self.fingerprint,
            "dtype": self.dtype,
            **precision,
            "experts": {"file": EXPERTS_FILE, "nbytes": self.experts_nbytes, "checksum": "xxh3_128, each expert"},
            "dense": {"file": DENSE_FILE, "nbytes": self.dense_nbytes, "xxh3_128": self.dense_checksum},
            "foregate_version": self.foregate_version,
            "transformers_version": self.transformers_version,
            "layers": layers,
        }
        return signed(content)

    def _kept(self, layer: PackedLayer) -> dict[str, Any]:
        if not self.precision.kept_experts:
            return {}
        layout = layer.kept_layout
        params = [asdict(param) for param in layout.params]
        return {"kept": {"slot_bytes": layout.nbytes, "params": params, "experts": list(layer.kept)}}


def signed(content: dict[str, Any]) -> str:
    """The text of a manifest with ``content``: closed by a checksum over everything before it."""
    return json.dumps({**content, CHECKSUM: _checksum(content)}) + "\n"


def _checksum(content: dict[str, Any]) -> str:
    """Over the content, not over its spelling: spaces and line ends may change."""
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    return str(xxhash.xxh3_128(json.dumps(rest).encode()).hexdigest())


def is_pack(directory: Path) -> bool:
    """Whether ``directory`` calls itself a finished pack."""
    return (directory / NAME).is_file()


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the pack ``directory``. Raises PackError naming the file if it is missing, junk or too new."""
    path = directory / NAME
    try:
        content = parse(path.read_bytes())
    except FileNotFoundError:
        raise PackError(f"{directory} is not a pack: it has no {NAME}") from None
    except (OSError, ValueError) as error:
        raise PackError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PackError(f"{path}: not the manifest of a pack")
    if content.get("version") not in (PLAIN_VERSION, VERSION):
        version = content.get("version")
        raise PackError(f"{path}: pack version {version}; this Foregate reads versions {PLAIN_VERSION} and {VERSION}")
    if content.get(CHECKSUM) != _checksum(content):
        raise PackError(f"{path}: damaged: its content does not match its own checksum; remove the pack and pack again")
    try:
        return _parse(content)
    except (KeyError, TypeError, ValueError) as error:
        raise PackError(f"{path}: damaged: {error!r}") from None


def _parse(content: dict[str, Any]) -> Manifest:
    layers = tuple(_layer(layer) for layer in content["layers"])
    kept = frozenset(ExpertKey(number, expert) for number, layer in enumerate(layers) for expert in layer.kept)
    plain = content["version"] == PLAIN_VERSION
    return Manifest(
        fingerprint=str(content["fingerprint"]),
        dtype=str(content["dtype"]),
        experts_nbytes=int(content["experts"]["nbytes"]),
        dense_nbytes=int(content["dense"]["nbytes"]),
        dense_checksum=str(content["dense"]["xxh3_128"]),
        layers=layers,
        foregate_version=str(content["foregate_version"]),
        transformers_version=str(content["transformers_version"]),
        precision=AS_SOURCE if plain else Precision.from_json(content["precision"], kept),
    )


def _layer(content: dict[str, Any]) -> PackedLayer:
    experts = tuple(PackedExpert(int(offset), int(nbytes), str(sum_)) for offset, nbytes, sum_ in content["experts"])
    layout, kept = _layout(content), content.get("kept")
    order = tuple(int(expert) for expert in content.get("order", ()))
    if order and sorted(order) != list(range(len(experts))):
        raise ValueError(f"order {order}")
    if kept is None:
        return PackedLayer(str(content["path"]), layout, experts, layout, order=order)
    numbers = tuple(int(expert) for expert in kept["experts"])
    return PackedLayer(str(content["path"]), layout, experts, _layout(kept), numbers, order)


def _layout(content: dict[str, Any]) -> ExpertLayout:
    params = tuple(ParamLayout(**{**param, "shape": tuple(param["shape"])}) for param in content["params"])
    return ExpertLayout(params, int(content["slot_bytes"]))
