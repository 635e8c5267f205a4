"""One training from traces to a predictor file: what ``foregate train`` does for one method.

Beside FILE.safetensors lie, while it is being trained, FILE.training/ (checkpoint and decoded columns, removed at the
end), and for good FILE.curve.jsonl (the loss curve).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from foregate.errors import ConfigError, PredictorError
from foregate.predictors import PREDICTORS
from foregate.predictors.file import Artifact, ModelIdentity, load, save
from foregate.trace.durable import write_file
from foregate.training import TRAINERS
from foregate.training.dataset import FRACTIONS, TRAIN, VALIDATION, Dataset
from foregate.training.standing import Teller
from foregate.training.trainer import Options, Trainer, parse_options

SUFFIX = ".safetensors"
REQUEST = "request.json"


class Bar(Protocol):
    """A progress bar."""

    def begin(self, stage: str, total: int | None) -> None: ...

    def advance(self, units: int = 1) -> None: ...

    def tell(self, line: str) -> None:
        """A line above the bar."""
        ...


@dataclass
class FileWatch:
    """Passes progress on to ``bar`` and whoever reads ``standing``, and appends the loss curve to ``curve``; implements
    ``trainer.Watch``."""

    state: Path
    curve: Path
    bar: Bar
    _begun: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._teller = Teller(self.state)

    def begin(self, stage: str, total: int | None) -> None:
        self.bar.begin(stage, total)
        self._teller.begin(stage, total)

    def advance(self, units: int = 1) -> None:
        self.bar.advance(units)
        self._teller.advance(units)

    def log(self, record: Mapping[str, Any]) -> None:
        if not self._begun:
            self._begun = True
            self._cut(int(record["step"]))
        with self.curve.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._teller.log(record)

    def _cut(self, step: int) -> None:
        """Drop what a killed training logged after its last checkpoint: it comes again."""
        before = self.curve.read_text().splitlines() if self.curve.exists() else []
        kept = [line for line in before if json.loads(line)["step"] < step]
        self.curve.write_text("".join(line + "\n" for line in kept))


@dataclass(frozen=True)
class Request:
    """What is to be trained. ``given`` are ``key=value`` texts."""

    predictor: str
    traces: tuple[Path, ...]
    out: Path
    given: tuple[str, ...] = ()
    threads: int | None = None

    @property
    def curve(self) -> Path:
        """The loss curve's file."""
        return self.out.with_suffix(".curve.jsonl")

    @property
    def state(self) -> Path:
        """Directory of checkpoints."""
        return self.out.with_suffix(".training")


def check(request: Request) -> tuple[Trainer, Options]:
    """The trainer and its options. Raises ConfigError for anything that cannot be honoured."""
    trainer = find_trainer(request.predictor)
    options = parse_options(trainer.options, request.given)
    if request.out.suffix != SUFFIX:
        raise ConfigError(f"--out {request.out} must end in {SUFFIX}")
    return trainer, options


def find_trainer(name: str) -> Trainer:
    """The trainer of predictor ``name``. Raises ConfigError, saying so where it needs no training."""
    if name not in TRAINERS.names and name in PREDICTORS.names:
        raise ConfigError(f"predictor {name!r} needs no training; those that do: {', '.join(TRAINERS.names)}")
    trainer: Trainer = TRAINERS.load(name)
    return trainer


def train(request: Request, bar: Bar) -> Artifact:
    """Train, or continue what was interrupted, and write the file. Raises ForegateError.

    A file that holds this very training already is left as it is; one that holds anything else is refused.
    """
    trainer, options = check(request)
    request.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{request.out.stem}-", dir=request.out.parent) as scratch:
        bar.begin("reading traces", None)
        data = Dataset(request.traces, Path(scratch), features=trainer.features)
        if trainer.scores and not data.score_kind:
            raise ConfigError(f"{request.predictor} needs router scores; trace with --scores")
        asked = any(text.startswith("lookahead=") for text in request.given)
        if asked and options.lookahead > data.layers:  # a method's own may be deeper: it looks as far as there is
            raise ConfigError(f"lookahead {options.lookahead}: at most {data.layers} with {data.layers} MoE layers")
        wanted = _describe(request, options, data)
        done = _finished(request, wanted)
        if done is not None:
            bar.tell(f"{request.out}: trained already, with the same data and options")
            return done
        _claim(request, wanted, bar)
        with _threads(request.threads):
            fitted = trainer.fit(data, options, FileWatch(request.state, request.curve, bar))
        artifact = Artifact(
            method=request.predictor,
            model=ModelIdentity.of_trace(data.model),
            lookahead=options.lookahead,
            arrays=fitted.tensors,
            options={**asdict(options), **fitted.settings},
            features=trainer.features,
            metrics={**fitted.metrics, "tokens": data.tokens(TRAIN), "validation_tokens": data.tokens(VALIDATION)},
            traces=data.names,
            trace_hash=data.hash(),
            prompts=data.contents(TRAIN, VALIDATION),
            seed=options.seed,
        )
        save(request.out, artifact)
    shutil.rmtree(request.state, ignore_errors=True)
    return artifact


def _describe(request: Request, options: Options, data: Dataset) -> dict[str, Any]:
    """Everything that the bytes of the file depend on, but for the versions of the software."""
    return {
        "predictor": request.predictor,
        "options": asdict(options),
        "model": data.model.fingerprint,
        "data": [data.hash(TRAIN), data.hash(VALIDATION)],
        "fractions": list(FRACTIONS),
    }


def _finished(request: Request, wanted: Mapping[str, Any]) -> Artifact | None:
    if not request.out.exists():
        return None
    try:
        there = load(request.out)
    except PredictorError as error:
        raise ConfigError(f"--out {error}") from None
    same = (
        there.method == wanted["predictor"]
        and there.model.fingerprint == wanted["model"]
        and there.trace_hash == wanted["data"][0]
        and all(there.options.get(name) == value for name, value in wanted["options"].items())
    )
    if not same:
        raise ConfigError(f"--out {request.out} exists and holds another training; delete it or give another file")
    return there


def _claim(request: Request, wanted: Mapping[str, Any], bar: Bar) -> None:
    """Make the state directory, or find that it belongs to this training."""
    path = request.state / REQUEST
    # One that ended before its first checkpoint has nothing to lose: mended options may take its place.
    if path.exists() and any(file.name != REQUEST for file in request.state.iterdir()):
        if json.loads(path.read_text()) != wanted:
            raise ConfigError(f"{request.state} is of a training with other data or options; delete it to begin anew")
        bar.tell(f"continuing the interrupted training in {request.state}")
        return
    request.state.mkdir(parents=True, exist_ok=True)
    request.curve.unlink(missing_ok=True)
    write_file(path, json.dumps(wanted, indent=1).encode())


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Sums in one order: ``count`` compute threads, and no algorithm whose result depends on their race."""
    import torch

    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(count or before[0])
    torch.use_deterministic_algorithms(True)
    # A debugging aid that takes a tenth of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def merge_options(sets: Sequence[str], **flags: int | float | str | None) -> tuple[str, ...]:
    """``sets`` and the flags that were given, as key=value. Raises ConfigError where a key is there twice."""
    given = [*sets, *(f"{name}={value}" for name, value in flags.items() if value is not None)]
    keys = [text.partition("=")[0] for text in given]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise ConfigError(f"option {twice[0]!r} is given twice")
    return tuple(given)
