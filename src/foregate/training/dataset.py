"""Routing traces as arrays for training: split by prompt text, columns and features mapped from disk. No torch.

Shapes: T tokens, L MoE layers, k experts chosen (widest layer), E experts (widest layer), D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from foregate.errors import TraceError
from foregate.trace.copying import SIDES, side_of
from foregate.trace.manifest import Entry
from foregate.trace.reader import TraceReader
from foregate.trace.tensors import Bits, map_tensors
from foregate.training.columns import Columns

FRACTIONS = (0.8, 0.1, 0.1)
"""Of prompts that are for training, for validation (early stopping), and for nothing but the test."""
SPLIT_SEED = 0
TRAIN, VALIDATION, TEST = SIDES
CHOICE, REPORT = "the first half of validation", "the second half of validation"
"""For methods that choose something by validation prompts after training: choose by one half, report on the other."""


def side(entry: Entry) -> str:
    """Train, validation or test: by the text alone, so it is the same for every trace, method and command."""
    return side_of(entry.content, FRACTIONS, SPLIT_SEED)


def content_hash(entries: Iterable[Entry]) -> str:
    """Hash (XXH3-128) of prompts and what was recorded of them: the checksums of their files, whatever their order."""
    sums = sorted(f"{e.part.xxh3} {e.features.xxh3 if e.features is not None else ''}" for e in entries)
    return xxhash.xxh3_128_hexdigest("\n".join(sums).encode())


@dataclass(frozen=True)
class Prompt:
    """One prompt. Arrays are views of files: small, or read when touched.

    ``experts`` [T, L, k] int16, best first by router weight, -1 where a layer chooses fewer; ``weights`` [T, L, k]
    float16; ``scores`` [T, L, E] float16 (NaN: no such expert) or None; ``token_id``, ``position`` [T] int32;
    ``decode`` [T] bool.
    """

    name: str
    domain: str
    content: str
    experts: NDArray[np.int16]
    weights: NDArray[np.float16]
    scores: NDArray[np.float16] | None
    token_id: NDArray[np.int32]
    position: NDArray[np.int32]
    decode: NDArray[np.bool_]
    bits: Mapping[str, Bits]
    absent: Callable[[float], NDArray[np.uint8]]
    """1 where an LRU cache of a share of all experts would lack an expert, [T, L, E]: see ``residency``."""

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.experts)

    def feature(self, name: str, rows: slice = slice(None)) -> NDArray[np.float32]:
        """Hidden states ``name`` of tokens ``rows``, [T, L, D] float32 (a copy). NaN in layers that have none."""
        bits = self.bits[name]
        layers = self.experts.shape[1]
        found: NDArray[np.float32] = bits.widen(slice(*_rows(rows, self.tokens, layers)))
        return found.reshape(-1, layers, found.shape[-1])


@dataclass(frozen=True)
class Block:
    """Tokens of several prompts, one after another; ``first`` [T] marks the first token of each prompt."""

    experts: NDArray[np.int64]
    weights: NDArray[np.float32]
    scores: NDArray[np.float32] | None
    token_id: NDArray[np.int64]
    first: NDArray[np.bool_]
    features: Mapping[str, NDArray[np.float32]]
    absent: NDArray[np.uint8] | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.experts)


class Dataset:
    """Prompts of one or more traces of one model. Memory does not grow with the traces: every array is a mapped file.

    ``scratch`` is a directory for the decoded columns; whoever gives it removes it.
    """

    def __init__(self, paths: Sequence[Path], scratch: Path, *, features: Collection[str] = ()) -> None:
        """Raises TraceError for no trace, one without ``features``, different models, and anything corrupted."""
        if not paths:
            raise TraceError("no trace is given")
        self.readers = [TraceReader(path) for path in paths]
        self.model = self.readers[0].header.model
        self.feature_names = tuple(features)
        for reader in self.readers:
            self._check(reader)
        found: dict[str, tuple[TraceReader, Entry]] = {}
        for reader in self.readers:
            for entry in reader.entries:
                found.setdefault(entry.part.xxh3, (reader, entry))
        self._found = list(found.values())
        headers = [reader.header.scores for reader in self.readers]
        self.score_kind = headers[0].kind if headers[0] is not None and all(headers) else ""
        self._columns = Columns(self._found, self.model, bool(self.score_kind), scratch)
        self._by_side: dict[str, list[int]] = {name: [] for name in SIDES}
        for number, (_, entry) in enumerate(self._found):
            self._by_side[side(entry)].append(number)
        self._by_side |= self._halves()
        self._verified: set[str] = set()

    @property
    def layers(self) -> int:
        """L."""
        return self.model.layers

    @property
    def experts(self) -> int:
        """E of the widest layer."""
        return max(self.model.experts_per_layer)

    @property
    def domains(self) -> tuple[str, ...]:
        """In order of appearance."""
        return tuple(dict.fromkeys(entry.domain for _, entry in self._found))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the data sets that were traced, as their runs state them."""
        runs = [run for reader in self.readers for run in reader.header.runs]
        return tuple(dict.fromkeys(str(run.dataset.get("name", run.source)) for run in runs))

    def tokens(self, where: str) -> int:
        """Tokens of a side."""
        return sum(self._found[number][1].tokens for number in self._by_side[where])

    def count(self, where: str) -> int:
        """Prompts of a side."""
        return len(self._by_side[where])

    def hash(self, where: str = TRAIN) -> str:
        """Hash (XXH3-128) of everything on a side: the checksums of its files, whatever their order."""
        return content_hash([self._found[number][1] for number in self._by_side[where]])

    def contents(self, *sides: str) -> tuple[str, ...]:
        """Hashes of the prompts of ``sides``, sorted."""
        return tuple(sorted({self._found[number][1].content for side in sides for number in self._by_side[side]}))

    def require(self, *sides: str) -> None:
        """Raises TraceError where one of ``sides`` has no prompt."""
        for where in sides:
            if not self._by_side[where]:
                places = ", ".join(str(reader.path) for reader in self.readers)
                raise TraceError(f"{places}: of {len(self._found)} prompts none is for {where}; trace more prompts")

    def prompts(self, where: str) -> Iterator[Prompt]:
        """Prompts of a side (train, validation, test), in the order of the traces."""
        return (self._prompt(number) for number in self._by_side[where])

    def blocks(
        self,
        where: str,
        tokens: int,
        features: Collection[str] = (),
        *,
        shuffle: tuple[int, int] | None = None,
        skip: int = 0,
        cache_share: float | None = None,
    ) -> Iterator[Block]:
        """Whole prompts, gathered until a block has at least ``tokens`` tokens; the last may have fewer.

        ``shuffle`` is (seed, epoch): another order of prompts for each, None for that of the traces. A prompt longer
        than ``tokens`` is cut into pieces, each of which begins like a prompt. The first ``skip`` blocks are not read.
        With ``cache_share``, blocks say what a cache of that share of all experts would lack.
        """
        pieces: list[tuple[Prompt, slice]] = []
        gathered = 0
        for number in self._order(where, shuffle):
            prompt = self._prompt(number)
            for start in range(0, prompt.tokens, tokens):
                piece = slice(start, min(start + tokens, prompt.tokens))
                pieces.append((prompt, piece))
                gathered += piece.stop - piece.start
                if gathered >= tokens:
                    if skip <= 0:
                        yield _block(pieces, features, cache_share)
                    pieces, gathered, skip = [], 0, skip - 1
        if pieces and skip <= 0:
            yield _block(pieces, features, cache_share)

    def _halves(self) -> dict[str, list[int]]:
        """Validation prompts, every second one of each domain; the same text is in the same half."""
        validation = self._by_side[VALIDATION]
        texts = {n: (self._found[n][1].domain, self._found[n][1].content) for n in validation}
        first = set(sorted(set(texts.values()))[::2])
        return {
            CHOICE: [n for n in validation if texts[n] in first],
            REPORT: [n for n in validation if texts[n] not in first],
        }

    def _order(self, where: str, shuffle: tuple[int, int] | None) -> list[int]:
        order = self._by_side[where]
        return order if shuffle is None else [order[n] for n in np.random.default_rng(shuffle).permutation(len(order))]

    def _prompt(self, number: int) -> Prompt:
        reader, entry = self._found[number]
        columns = self._columns.of(number)
        bits: dict[str, Bits] = {}
        if self.feature_names:
            assert entry.features is not None
            if entry.features.file not in self._verified:
                reader.content(entry.features)  # checksum, once: what is mapped afterwards is what was written
                self._verified.add(entry.features.file)
            bits = map_tensors(reader.path / entry.features.file)
        return Prompt(
            entry.prompt,
            entry.domain,
            entry.content,
            bits=bits,
            absent=partial(self._columns.absent, number),
            **columns,
        )

    def _check(self, reader: TraceReader) -> None:
        model = reader.header.model
        if model.fingerprint != self.model.fingerprint:
            theirs, ours = f"{model.name} ({model.fingerprint})", f"{self.model.name} ({self.model.fingerprint})"
            raise TraceError(f"{reader.path} is a trace of {theirs}, {self.readers[0].path} of {ours}")
        for name in self.feature_names:
            if name not in reader.header.features:
                has = ", ".join(reader.header.features) or "none"
                raise TraceError(f"{reader.path}: traced without {name} (it has: {has}); trace with --features {name}")


def _rows(rows: slice, tokens: int, layers: int) -> tuple[int, int]:
    start, stop, _ = rows.indices(tokens)
    return start * layers, stop * layers


def _block(pieces: Sequence[tuple[Prompt, slice]], features: Collection[str], cache_share: float | None) -> Block:
    def joined(name: str, dtype: Any) -> NDArray[Any]:
        return np.concatenate([getattr(prompt, name)[rows] for prompt, rows in pieces]).astype(dtype)

    lengths = [rows.stop - rows.start for _, rows in pieces]
    first = np.zeros(sum(lengths), bool)
    first[np.cumsum([0, *lengths[:-1]])] = True
    return Block(
        experts=joined("experts", np.int64),
        weights=joined("weights", np.float32),
        scores=joined("scores", np.float32) if pieces[0][0].scores is not None else None,
        token_id=joined("token_id", np.int64),
        first=first,
        features={name: np.concatenate([p.feature(name, rows) for p, rows in pieces]) for name in features},
        absent=None if cache_share is None else np.concatenate([p.absent(cache_share)[rows] for p, rows in pieces]),
    )
