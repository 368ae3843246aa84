"""KServe's clients over HTTP and gRPC, unmodified."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.serving import Serving

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("kserve") is None,
    reason="kserve is not here: it wants older packages than the rest; make stock installs it apart",
)


@pytest.fixture(scope="module")
def told(stock_server: Serving) -> dict[str, Any]:
    """What its clients were told, by protocol."""
    script = str(Path(__file__).with_name("kserve_client.py"))
    command = [sys.executable, script, stock_server.http_url, stock_server.grpc_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_server_is_alive_and_ready(told: dict[str, Any], protocol: str) -> None:
    found = told[protocol]
    assert (found["live"], found["ready"], found["model ready"]) == (True, True, True)
    assert not found["other ready"]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tensors_come_back_as_they_went(told: dict[str, Any], protocol: str) -> None:
    for form in ("binary", "json" if protocol == "http" else "typed"):
        assert told[protocol][form] == ["7", "echo_FP32", [[1.5, -2.0, 3.0]]]
    assert told[protocol]["text"] == ["7", "echo_BYTES", [["one two", "größer", ""]]]


@pytest.mark.parametrize(
    ("protocol", "unknown", "late"),
    [("http", 404, {429, 504}), ("grpc", "NOT_FOUND", {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"})],
)
def test_refusals_say_why(told: dict[str, Any], protocol: str, unknown: int | str, late: set[Any]) -> None:
    code, text = told[protocol]["unknown"]
    assert (code, "unknown model: 'nosuch'" in text) == (unknown, True)
    # No status that its clients answer by sending the same again.
    code, text = told[protocol]["late"]
    assert code in late
    assert "deadline" in text
