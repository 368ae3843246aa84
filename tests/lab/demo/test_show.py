"""The whole demo with the tiny models: a real server, the public client, one screen, JSON."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from clockwork_lab.demo.show import Demo
from clockwork_lab.demo.start import DemoOptions


@pytest.mark.system
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_demo_runs_without_a_network(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    options = DemoOptions(json=tmp_path / "demo.json", cache=tmp_path / "cache", seconds=2.0, offline=True)
    assert Demo(options, console).run() == 0
    shown = console.file.getvalue()
    found = json.loads((tmp_path / "demo.json").read_bytes())
    assert [model["name"] for model in found["models"]] == ["add_sub", "mlp", "words"]
    for model in found["models"]:
        assert model["answer_ok"]
        assert model["answer"] in shown
        assert model["requests"] == model["ok"] + model["rejected"] + model["late"] + model["failed"]
        assert model["requests"] > 20
        assert model["failed"] == 0
        assert model["worst_error"] <= 1e-5
    assert found["instances"] == 3
    assert found["loads"] >= 2
