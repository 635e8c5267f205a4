"""Tokenised corpus on disk, and which block of it is in which training step (a pure function of the step).

Shapes: B sequences of a step, S positions, one block = S + 1 consecutive tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from foregate.errors import ForegateError
from foregate.reference.corpus import Document, Manifest, documents, is_held_out
from foregate.reference.files import write_json
from foregate.reference.tokenizer import END_ID, train_tokenizer

Tokens = NDArray[np.uint16]


class DataError(ForegateError, ValueError):
    """A corpus that is too small for what is asked of it, or not the one that training began with."""


@dataclass(frozen=True)
class TokenisedDomain:
    """Tokens of one domain; documents are joined by the end-of-text token."""

    name: str
    share: float
    train: Tokens
    held_out: Tokens
    documents: int
    held_out_documents: int


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus; `digest` identifies its content, tokenizer included."""

    tokenizer: Tokenizer
    domains: tuple[TokenisedDomain, ...]
    max_epochs: float
    digest: str


def build_corpus(
    manifest: Manifest, data_dir: Path | None, folder: Path, vocab_size: int, tokenizer: Tokenizer | None = None
) -> Corpus:
    """Read, split and tokenise all sources into `folder`; trains a tokenizer on the training split unless given one."""
    split = {
        domain.name: _split(list(documents(domain, data_dir)), manifest.held_out_share) for domain in manifest.domains
    }
    if tokenizer is None:
        tokenizer = train_tokenizer((doc.text for train, _ in split.values() for doc in train), vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    figures: dict[str, dict[str, object]] = {}
    for domain in manifest.domains:
        train, held_out = split[domain.name]
        if not train or not held_out:
            raise DataError(
                f"domain {domain.name!r}: {len(train)} training and {len(held_out)} held-out documents; both must exist"
            )
        np.save(folder / f"{domain.name}.train.npy", _encode(tokenizer, train))
        np.save(folder / f"{domain.name}.heldout.npy", _encode(tokenizer, held_out))
        figures[domain.name] = {"share": domain.share, "documents": len(train), "held_out_documents": len(held_out)}
    write_json(folder / "corpus.json", {"max_epochs": manifest.max_epochs, "domains": figures})
    return load_corpus(folder)


def load_corpus(folder: Path) -> Corpus:
    """Open a corpus that `build_corpus` wrote."""
    try:
        figures = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        digest = hashlib.sha256((folder / "tokenizer.json").read_bytes())
        domains = []
        for name, entry in figures["domains"].items():
            train = np.load(folder / f"{name}.train.npy")
            held_out = np.load(folder / f"{name}.heldout.npy")
            digest.update(train.tobytes() + held_out.tobytes())
            domains.append(
                TokenisedDomain(name, entry["share"], train, held_out, entry["documents"], entry["held_out_documents"])
            )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"corpus in {folder} cannot be read: {error}") from error
    return Corpus(tokenizer, tuple(domains), figures["max_epochs"], digest.hexdigest())


def _split(docs: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    held_out = [doc for doc in docs if is_held_out(doc, share)]
    return [doc for doc in docs if not is_held_out(doc, share)], held_out


def _encode(tokenizer: Tokenizer, docs: list[Document]) -> Tokens:
    ids: list[NDArray[np.uint16]] = []
    for start in range(0, len(docs), 256):
        for encoding in tokenizer.encode_batch([doc.text for doc in docs[start : start + 256]]):
            ids.append(np.array([*encoding.ids, END_ID], dtype=np.uint16))
    return np.concatenate(ids)


class Batches:
    """Deals blocks to steps. Per domain: shuffled epochs without replacement; across domains: the exact shares."""

    def __init__(self, corpus: Corpus, rows: int, length: int, seed: int) -> None:
        self.corpus, self.rows, self.length, self.seed = corpus, rows, length, seed
        self._shares = np.array([domain.share for domain in corpus.domains])
        self._blocks = [(len(domain.train) - 1) // length for domain in corpus.domains]
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}
        if rows * self._shares.min() < 1:  # below one row a step, rounding could deal a block twice
            raise DataError(f"{rows} rows a step are too few for a domain share of {self._shares.min():g}")
        for domain, blocks in zip(corpus.domains, self._blocks, strict=True):
            if blocks < 1:
                raise DataError(
                    f"domain {domain.name!r} has {len(domain.train)} tokens, fewer than a block of {length}"
                )

    def check(self, steps: int) -> None:
        """Raise DataError where `steps` steps would repeat a domain more often than the manifest allows."""
        for domain, drawn, blocks in zip(
            self.corpus.domains, self._dealt(steps * self.rows), self._blocks, strict=True
        ):
            epochs = drawn / blocks
            if epochs > self.corpus.max_epochs:
                most = int(self.corpus.max_epochs * blocks * self.length / domain.share)
                raise DataError(
                    f"domain {domain.name!r} would be seen {epochs:.1f} times (max_epochs {self.corpus.max_epochs:g}); "
                    f"at most {most} tokens with this corpus"
                )

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each domain has been seen after `steps` steps."""
        drawn = self._dealt(steps * self.rows)
        names = [domain.name for domain in self.corpus.domains]
        return {name: float(n) / blocks for name, n, blocks in zip(names, drawn, self._blocks, strict=True)}

    def step(self, step: int) -> torch.Tensor:
        """Tokens [B, S + 1] (int64) of a step, the same on every call."""
        before, after = self._dealt(step * self.rows), self._dealt((step + 1) * self.rows)
        blocks = [
            self._block(domain, int(position))
            for domain in range(len(self._shares))
            for position in range(int(before[domain]), int(after[domain]))
        ]
        return torch.from_numpy(np.stack(blocks).astype(np.int64))

    def _dealt(self, rows: int) -> NDArray[np.int64]:
        """Blocks of each domain among the first `rows` rows (cumulative rounding keeps the shares exact)."""
        edges = np.floor(np.cumsum(self._shares) * rows + 0.5).astype(np.int64)
        edges[-1] = rows
        return np.diff(edges, prepend=0)

    def _block(self, domain: int, position: int) -> Tokens:
        epoch, index = divmod(position, self._blocks[domain])
        key = (domain, epoch)
        if key not in self._orders:
            generator = np.random.default_rng((self.seed, domain, epoch))
            self._orders[key] = generator.permutation(self._blocks[domain])
        start = int(self._orders[key][index]) * self.length
        return self.corpus.domains[domain].train[start : start + self.length + 1]


def held_out_blocks(domain: TokenisedDomain, length: int, tokens: int) -> Iterator[torch.Tensor]:
    """Consecutive held-out blocks [S + 1] (int64), about `tokens` tokens in all, spread evenly over the split."""
    available = (len(domain.held_out) - 1) // length
    if available < 1:
        raise DataError(
            f"domain {domain.name!r}: {len(domain.held_out)} held-out tokens, fewer than a block of {length}"
        )
    wanted = min(available, max(1, tokens // length))
    for index in np.linspace(0, available - 1, wanted).astype(int):
        piece = domain.held_out[index * length : (index + 1) * length + 1]
        yield torch.from_numpy(piece.astype(np.int64))
