"""The gallery: every picture is there, small, shown, and its sentence is what the numbers say."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from foregate.analysis.captions import captions
from foregate.analysis.settings import Settings
from foregate.analysis.study import analyse
from foregate.trace.sample import SAMPLE

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "gallery"
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    """scripts/gallery.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "scripts" / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["gallery"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def known() -> dict[str, list[dict[str, str]]]:
    return dict(json.loads((PICTURES / "gallery.json").read_text(encoding="utf-8")))


def test_every_picture_is_there_small_and_shown(gallery: ModuleType, known: dict[str, Any]) -> None:
    files = [picture["file"] for pictures in known.values() for picture in pictures]
    assert sorted([*files, "gallery.json"]) == sorted(path.name for path in PICTURES.iterdir())
    assert all(1_000 < (PICTURES / file).stat().st_size <= gallery.LARGEST for file in files)
    pictures = {step: [gallery.Picture(**one) for one in made] for step, made in known.items()}
    assert (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8") == gallery.page(pictures)
    assert set(known) <= set(gallery.STEPS)


def test_every_sentence_is_what_the_shipped_trace_says(known: dict[str, Any]) -> None:
    """Recorded the trace anew, or changed a statistic? ``make gallery STEPS=routing``."""
    told = captions(analyse([SAMPLE], Settings(replay_events=2_000, permutations=1_000)))
    for picture in known["routing"]:
        name = Path(picture["file"]).stem
        if "hit_curve" in name or "misses" in name:  # replayed further for the gallery than a test has time for
            continue
        assert NUMBER.sub("#", picture["sentence"]) == NUMBER.sub("#", told[name])
        assert numbers(picture["sentence"]) == pytest.approx(numbers(told[name]), rel=0.1, abs=0.01), name


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "").rstrip(".")) for number in NUMBER.findall(text)]


def test_one_step_is_made_again_without_the_others(gallery: ModuleType, tmp_path: Path) -> None:
    def picture(file: str) -> Any:
        (tmp_path / file).write_text("x")
        return gallery.Picture(file, file, "Seen.", "foregate")

    gallery.remember(tmp_path, "report", [picture("a.png"), picture("b.png")])
    gallery.remember(tmp_path, "routing", [picture("c.svg")])
    kept = gallery.remember(tmp_path, "report", [picture("a.png")])
    files = {step: [one.file for one in made] for step, made in kept.items()}
    assert files == {"routing": ["c.svg"], "report": ["a.png"]}
    assert not (tmp_path / "b.png").exists()
    assert gallery.page(kept).index("c.svg") < gallery.page(kept).index("a.png")


def test_an_unknown_step_is_named(gallery: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no step nothing; there are routing, "):
        gallery.main(["nothing"])
