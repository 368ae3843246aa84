"""``clockwork plan --check`` on a real server: every request is known to both sides, whatever came of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from clockwork_serve.cli.entry import run
from harness import repositories
from harness.serving import Serving

SCENARIO = """
name = "check"
seconds = 3
warmup_s = 1

[cluster]
zoo = "net.csv"

[[models]]
name = "net"
kind = "net"
copies = 2

[[loads]]
name = "people"
models = ["net"]
arrivals = "poisson"
rate_rps = 40
slo_ms = 250
"""


def test_a_prediction_is_held_against_a_server(
    tmp_path: Path, start: Callable[..., AbstractContextManager[Serving]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Which wants keys."""
    keys = tmp_path / "keys.toml"
    keys.touch(0o600)
    assert run(["key", "planner", "--may", "infer", "--may", "metrics"]) == 0
    made = capsys.readouterr()
    keys.write_text(made.out)
    monkeypatch.setenv("CLOCKWORK_API_KEY", made.err.split()[-1])
    for copy in range(2):
        repositories.emulated(tmp_path / "models", f"net-{copy:04d}", {1: 10.0, 8: 24.0})
    (tmp_path / "net.csv").write_text("model,weights_mb,load_ms,infer_b1_ms,infer_b8_ms\nnet,1,1,10,24\n")
    (tmp_path / "check.toml").write_text(SCENARIO)

    with start(tmp_path / "models", device="emulated", api_keys=str(keys)) as serving:
        given = ["--check", serving.http_url, "--json", str(tmp_path / "out.json")]
        assert run(["plan", str(tmp_path / "check.toml"), *given]) in {0, 1}  # by how busy the machine is

    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_bytes())
    assert [model["name"] for model in found["models"]] == ["net-0000", "net-0001"]
    assert found["unmatched"] == 0
    assert found["both"] + found["only_predicted"] == found["total"]["requests"] > 40
    assert "predicted for 1 device" in shown
