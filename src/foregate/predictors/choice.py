"""From what ``--predictor`` says to a predictor: a registered name, or the file of one that was trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from foregate.errors import ConfigError
from foregate.interfaces import Predictor, Signals
from foregate.predictors import PREDICTORS
from foregate.predictors.file import ModelIdentity, load
from foregate.types import Moment, Prediction

SUFFIX = ".safetensors"


def is_file(text: str) -> bool:
    """Whether ``text`` is meant as a predictor file; a registered name wins over a file of that name."""
    return text not in PREDICTORS.names and ("/" in text or text.endswith(SUFFIX) or Path(text).is_file())


def check(text: str) -> str:
    """``text`` itself. Raises ConfigError for an unknown name, PredictorError for a file that cannot be used."""
    if is_file(text):
        PREDICTORS.check(load(Path(text).expanduser()).method)
        return text
    return PREDICTORS.check(text)


def make_predictor(text: str, lookahead: int | None, model: Callable[[], ModelIdentity]) -> Predictor:
    """The predictor that ``text`` names. ``lookahead`` None: its own. ``model`` is asked only for a file.

    Raises ConfigError for an unknown name, a method that needs a file, or a lookahead at which it predicts nothing;
    PredictorError for a file that is damaged or of another model.
    """
    if is_file(text):
        predictor = _from_file(Path(text).expanduser(), lookahead, model())
    else:
        method = PREDICTORS.load(text)
        if getattr(method, "needs_file", False):
            raise ConfigError(f"predictor {text!r} must be trained first: give the file that `foregate train` makes")
        least = getattr(method, "default_lookahead", 1)
        predictor = method(lookahead=least if lookahead is None else lookahead)
    _check_reach(predictor)
    return predictor


def reach(predictor: Predictor) -> int:
    """Layers that it predicts each time: the one at which it is asked counts, unless that has been routed already."""
    return predictor.lookahead + (predictor.moment is not Moment.AFTER_ROUTING)


def beginning(predictor: Predictor) -> Callable[[Signals], Callable[[], Sequence[Prediction]]] | None:
    """Its ``begin`` (``interfaces.Beginner``); None where it has none, or what it predicts was changed by a subclass or
    on the object itself."""
    for holder in (predictor, *type(predictor).__mro__):
        own = getattr(holder, "__dict__", {})
        if "begin" in own or "predict" in own:
            return getattr(predictor, "begin", None) if "begin" in own else None
    return None


def _from_file(path: Path, lookahead: int | None, model: ModelIdentity) -> Predictor:
    artifact = load(path)
    method: Any = PREDICTORS.load(artifact.method)
    if not hasattr(method, "from_file"):
        raise ConfigError(f"{path}: predictor {artifact.method!r} reads no file")
    artifact.check_model(model)
    predictor: Predictor = method.from_file(artifact, artifact.lookahead if lookahead is None else lookahead)
    return predictor


def _check_reach(predictor: Predictor) -> None:
    if reach(predictor) < 1:
        raise ConfigError(f"lookahead {predictor.lookahead}: {predictor.name} is asked after routing; give at least 1")
