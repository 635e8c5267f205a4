"""``foregate predictor cost`` times the calls of the engine itself, and says so where there are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foregate.cli.main import app
from foregate.errors import ConfigError

Tiny = Callable[[str], Path]


def test_every_layer_of_every_token_is_timed(tiny: Tiny) -> None:
    options = ["predictor", "cost", "next-gate", "--model", str(tiny("qwen3_moe")), "--tokens", "5", "--json"]
    ran = CliRunner().invoke(app, options, catch_exceptions=False)
    found = json.loads(ran.stdout)
    assert found["tokens"] == 5
    assert 0 < found["predict_us"] + found["observe_us"] < found["us_per_token"]
    assert found["us_per_token"] == pytest.approx((found["predict_us"] + found["observe_us"]) * found["layers"])
    assert found["share"] > 0
    spent = found["predict_us"] + found["observe_us"]
    assert found["waiting_share"] == pytest.approx(spent / found["waiting_layer_us"])
    assert found["flops"] > 0
    assert found["alone_us"] > 0
    ran = CliRunner().invoke(app, ["predictor", "cost", "previous-token", *options[3:]], catch_exceptions=False)
    assert json.loads(ran.stdout)["alone_us"] is None


def test_a_predictor_that_is_never_asked_has_no_cost(tiny: Tiny) -> None:
    options = ["predictor", "cost", "next-gate", "--model", str(tiny("qwen3_moe")), "--budget", "100%"]
    with pytest.raises(ConfigError, match="never asked: all experts fit"):
        CliRunner().invoke(app, options, catch_exceptions=False)
