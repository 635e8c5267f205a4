"""From a manifest to documents: which texts a model is trained on, and which are held out for good.

No tensors and no tokens here. A manifest is JSON or TOML; docs/reference-model.md describes its keys.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import json
import string
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from foregate.errors import ForegateError
from foregate.reference.markup import MARKUPS, tidy

SHIPPED_MANIFEST = Path(__file__).with_name("manifest.json")
KINDS = ("files", "jsonl", "stdlib", "hub")
SHORTEST = 64  # characters; below that a document is a redirect or an empty page


class ManifestError(ForegateError, ValueError):
    """A corpus manifest that cannot be read, or one of its sources that is absent."""


@dataclass(frozen=True)
class Source:
    """One place that documents come from. `path` is relative to the data directory unless absolute."""

    kind: str
    title: str = ""
    path: str = ""
    glob: str = "**/*"
    exclude: tuple[str, ...] = ()
    markup: str = "text"
    template: str = ""
    max_bytes: int = 400_000
    dataset: str = ""
    config: str = ""
    split: str = "train"
    licence: str = "unknown"
    origin: str = ""
    obtain: str = ""


@dataclass(frozen=True)
class Domain:
    """A named part of the corpus and its share of the training tokens."""

    name: str
    share: float
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything that defines a corpus. `held_out_share` is a share of the documents of each domain."""

    domains: tuple[Domain, ...]
    held_out_share: float = 0.03
    max_epochs: float = 5.0


@dataclass(frozen=True)
class Document:
    """One text; `name` is stable across machines, it decides the split."""

    domain: str
    name: str
    text: str


def load_manifest(path: Path = SHIPPED_MANIFEST) -> Manifest:
    """Read and check a manifest (.json or .toml). Raises ManifestError with the offending value."""
    raw = _read(path)
    _only(raw, {"version", "held_out_share", "max_epochs", "domains"}, path.name)
    if raw.get("version") != 1:
        raise ManifestError(f"{path}: version {raw.get('version')!r} is not 1")
    domains = raw.get("domains")
    if not isinstance(domains, dict) or not domains:
        raise ManifestError(f"{path}: no domains")
    parsed = tuple(_domain(name, value) for name, value in domains.items())
    total = sum(domain.share for domain in parsed)
    if abs(total - 1.0) > 1e-6:
        raise ManifestError(f"{path}: the shares of the domains sum to {total:g}, not 1")
    held_out = float(raw.get("held_out_share", 0.03))
    if not 0.0 < held_out < 0.5:
        raise ManifestError(f"{path}: held_out_share {held_out:g} is not between 0 and 0.5")
    return Manifest(parsed, held_out, float(raw.get("max_epochs", 5.0)))


def documents(domain: Domain, data_dir: Path | None) -> Iterator[Document]:
    """All documents of a domain, exact duplicates removed. Raises ManifestError where a source is missing."""
    seen: set[str] = set()
    for source in domain.sources:
        for name, text in _READERS[source.kind](source, data_dir):
            text = tidy(text)
            digest = hashlib.sha256(text.encode()).hexdigest()
            if len(text) < SHORTEST or digest in seen:
                continue
            seen.add(digest)
            yield Document(domain.name, name or digest, text)


def is_held_out(document: Document, share: float) -> bool:
    """The split: a hash of domain and name, so that no run on any machine trains on a held-out document."""
    digest = hashlib.sha256(f"{document.domain}/{document.name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ManifestError(f"manifest {path} cannot be read: {error.strerror}") from error
    if path.suffix not in (".json", ".toml"):
        raise ManifestError(f"manifest {path}: neither .json nor .toml")
    try:
        raw = json.loads(text) if path.suffix == ".json" else _toml(text)
    except ValueError as error:
        raise ManifestError(f"manifest {path} does not parse: {error}") from error
    if not isinstance(raw, dict):
        raise ManifestError(f"manifest {path} is a {type(raw).__name__}, not a table")
    return raw


def _toml(text: str) -> Any:
    try:
        parser = importlib.import_module("tomllib")
    except ImportError as error:
        raise ManifestError("a TOML manifest needs Python 3.11 or later; use JSON") from error
    return parser.loads(text)


def _only(raw: Mapping[str, object], known: set[str], where: str) -> None:
    unknown = sorted(set(raw) - known)
    if unknown:
        raise ManifestError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")


def _domain(name: str, raw: Any) -> Domain:
    if not isinstance(raw, dict):
        raise ManifestError(f"domain {name!r} is a {type(raw).__name__}, not a table")
    _only(raw, {"share", "sources"}, f"domain {name!r}")
    share = raw.get("share")
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ManifestError(f"domain {name!r}: share {share!r} is not in (0, 1]")
    sources = tuple(_source(name, value) for value in raw.get("sources", ()))
    if not sources:
        raise ManifestError(f"domain {name!r} has no sources")
    return Domain(name, float(share), sources)


def _source(domain: str, raw: Mapping[str, Any]) -> Source:
    where = f"source {raw.get('title') or raw.get('path') or raw.get('kind')!r} of domain {domain!r}"
    _only(raw, {field.name for field in fields(Source)}, where)
    if raw.get("kind") not in KINDS:
        raise ManifestError(f"{where}: kind {raw.get('kind')!r} is not one of {', '.join(KINDS)}")
    if raw.get("markup", "text") not in MARKUPS:
        raise ManifestError(f"{where}: markup {raw['markup']!r} is not one of {', '.join(MARKUPS)}")
    for key in {"files": ("path",), "jsonl": ("path", "template"), "hub": ("dataset", "template")}.get(raw["kind"], ()):
        if not raw.get(key):
            raise ManifestError(f"{where}: {key!r} is missing")
    return Source(**{**raw, "exclude": tuple(raw.get("exclude", ()))})


def _locate(source: Source, data_dir: Path | None) -> list[Path]:
    hint = f"; {source.obtain}" if source.obtain else ""
    if not Path(source.path).is_absolute() and data_dir is None:
        raise ManifestError(f"source {source.title!r} needs --data-dir (it is {source.path!r} there){hint}")
    pattern = str((data_dir or Path()) / source.path)
    found = [Path(path) for path in sorted(glob.glob(pattern))]  # noqa: PTH207 - absolute patterns
    if not found:
        raise ManifestError(f"source {source.title!r}: {pattern} does not exist{hint}")
    return found


def _tree(source: Source, roots: list[Path]) -> Iterator[tuple[str, str]]:
    convert = MARKUPS[source.markup]
    found = False
    for root in roots:
        for path in sorted(root.glob(source.glob)):
            name = path.relative_to(root).as_posix()
            if any(fnmatch(name, pattern) or fnmatch(f"/{name}", pattern) for pattern in source.exclude):
                continue
            if not path.is_file() or path.stat().st_size > source.max_bytes:
                continue
            found = True
            yield f"{source.title}/{name}", convert(path.read_text(encoding="utf-8", errors="replace"))
    if not found:
        where = ", ".join(map(str, roots))
        raise ManifestError(f"source {source.title!r}: nothing matches {source.glob!r} in {where}; {source.obtain}")


def _files(source: Source, data_dir: Path | None) -> Iterator[tuple[str, str]]:
    yield from _tree(source, _locate(source, data_dir))


def _stdlib(source: Source, _: Path | None) -> Iterator[tuple[str, str]]:
    tree = Source(**{**vars(source), "glob": "**/*.py", "markup": "text"})
    yield from _tree(tree, [Path(sysconfig.get_path("stdlib"))])


def _jsonl(source: Source, data_dir: Path | None) -> Iterator[tuple[str, str]]:
    for path in _locate(source, data_dir):
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield "", source.template.format_map(json.loads(line))
                except (ValueError, TypeError, KeyError) as error:
                    keys = [key for _, key, _, _ in string.Formatter().parse(source.template) if key]
                    raise ManifestError(f"{path}:{number}: not an object with {', '.join(keys)}: {error}") from error


def _hub(source: Source, _: Path | None) -> Iterator[tuple[str, str]]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ManifestError(f"source {source.dataset!r} is on the hub; pip install datasets") from error
    try:
        rows = datasets.load_dataset(source.dataset, source.config or None, split=source.split, streaming=True)
        for row in rows:
            yield "", source.template.format_map(row)
    except (OSError, ValueError, KeyError) as error:
        raise ManifestError(f"hub data set {source.dataset!r} ({source.split}): {error}") from error


_READERS = {"files": _files, "jsonl": _jsonl, "stdlib": _stdlib, "hub": _hub}
