"""Which predictors are evaluated: names, files, and combinations of several under one allowance of reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foregate.errors import ConfigError
from foregate.evaluation.settings import CONTROLS
from foregate.predictors import PREDICTORS
from foregate.predictors.choice import SUFFIX, check, is_file

_LOOKAHEAD = re.compile(r"(.+)@(\d{1,3})")


@dataclass(frozen=True, slots=True)
class Candidate:
    """``name`` in results; ``members`` as ``--predictor`` takes them, several where they are combined."""

    name: str
    members: tuple[str, ...]

    @property
    def control(self) -> bool:
        return self.name in CONTROLS


def candidates(given: Sequence[str], directory: Path | None) -> list[Candidate]:
    """The controls first, then ``given``, then every file in ``directory``.

    ``A+B`` is a combination, ``A@N`` looks N layers ahead.

    Raises ConfigError for an unknown name, a name that is there twice, and an empty directory; PredictorError for a
    file that cannot be used.
    """
    texts = [*CONTROLS, *(text for text in given if text not in CONTROLS)]
    if directory is not None:
        found = sorted(str(path) for path in directory.glob(f"*{SUFFIX}"))
        if not found:
            raise ConfigError(f"{directory}: no predictor files (*{SUFFIX})")
        texts += [text for text in found if text not in texts]
    out: dict[str, Candidate] = {}
    for text in texts:
        members = (text,) if Path(text).is_file() else tuple(text.split("+"))
        for member in members:
            check(split_lookahead(member)[0])
        name = "+".join(_label(member) for member in members)
        if name in out:
            raise ConfigError(f"two predictors are called {name!r}: {out[name].members[0]} and {text}")
        out[name] = Candidate(name, members)
    return list(out.values())


def trainable_free() -> list[str]:
    """Every registered method, strangers' included, that needs no file and is not a control."""
    names = [name for name in PREDICTORS.names if name not in CONTROLS]
    return [name for name in names if not getattr(PREDICTORS.load(name), "needs_file", False)]


def split_lookahead(member: str) -> tuple[str, int | None]:
    """``next-gate@2`` → name and lookahead; None for its own. A file of that very name is a file."""
    match = None if Path(member).is_file() else _LOOKAHEAD.fullmatch(member)
    return (match[1], int(match[2])) if match else (member, None)


def _label(member: str) -> str:
    text, lookahead = split_lookahead(member)
    name = Path(text).name.removesuffix(SUFFIX) if is_file(text) else text
    return name if lookahead is None else f"{name}@{lookahead}"
