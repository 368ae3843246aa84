"""The command as an operator starts and stops it: ``clockwork serve`` in a process of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness import machine, repositories
from harness.serving import until
from tests.end_to_end.commands import START_S, alive, command, started
from tests.end_to_end.conftest import ROOT, call, x_json


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_running_work_end_and_takes_no_more(
    tmp_path: Path, cache: Path, number: signal.Signals
) -> None:
    root = tmp_path / "models"
    repositories.emulated(root, "slow", {1: 5000})
    found: list[int] = []
    with started(command(root, cache, "--device", "emulated:v100")) as (process, ready):
        body = x_json([0.0] * 4, parameters={"slo_ms": 60_000})
        client = threading.Thread(
            target=lambda: found.append(call(ready["http"], "/v2/models/slow/infer", body).status)
        )
        client.start()
        wait_until_open(ready["metrics"])
        process.send_signal(number)
        until("it drains", lambda: call(ready["http"], "/v2/health/ready").status != 200)
        late = call(ready["http"], "/v2/models/slow/infer", body)
        assert (late.status, late.json["reason"]) == (503, "draining")
        client.join(START_S)
        assert process.wait(START_S) == 0
    assert found == [200]


def wait_until_open(metrics_url: str) -> None:
    """Until the request is with the controller."""
    base, path = metrics_url.removesuffix("/metrics"), "/metrics"
    for _ in range(1000):
        if b"clockwork_requests_open 1" in call(base, path).json:
            return
    raise AssertionError("the request never arrived")


def test_the_example_models_are_served_by_the_command(cache: Path) -> None:
    with started(command(ROOT / "examples" / "models", cache)) as (process, ready):
        assert ready["models"] == 3
        assert call(ready["http"], "/v2/health/ready").status == 200
        process.terminate()
        assert process.wait(START_S) == 0


def run_to_end(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=START_S, check=False)


def test_an_occupied_port_is_named(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "models"
    repositories.emulated(root, "slow", {1: 1})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_to_end([*command(root, cache, "--device", "emulated:v100"), "--http-port", str(port)])
    assert ended.returncode != 0
    assert str(port) in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_repository_with_nothing_to_serve_says_why(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "models"
    (root / "corrupt" / "1").mkdir(parents=True)
    (root / "corrupt" / "1" / "model.onnx").write_bytes(b"this is no graph")
    ended = run_to_end(command(root, cache))
    assert ended.returncode != 0
    assert "corrupt" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_missing_repository_is_named(tmp_path: Path, cache: Path) -> None:
    ended = run_to_end(command(tmp_path / "nowhere", cache))
    assert ended.returncode != 0
    assert "nowhere" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    root = tmp_path / "models"
    repositories.emulated(root, "slow", {1: 1})
    (tmp_path / "file").write_text("no folder")
    ended = run_to_end(command(root, tmp_path / "file" / "cache", "--device", "emulated:v100"))
    assert ended.returncode != 0
    assert "cache" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_no_process_outlives_a_killed_supervisor(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "models"
    repositories.emulated(root, "slow", {1: 1})
    with started(command(root, cache, "--device", "emulated:v100")) as (process, _):
        children = machine.children(process.pid)
        assert len(children) >= 3
        process.kill()
        process.wait(START_S)
        for _ in range(600):
            if not any(alive(child) for child in children):
                return
            threading.Event().wait(0.05)
        raise AssertionError([child for child in children if alive(child)])


def test_a_disk_that_takes_no_more_fails_the_compile_and_nothing_later(tmp_path: Path) -> None:
    root, cache = tmp_path / "models", tmp_path / "cache"
    repositories.one_matrix(root, "large", repositories.matrix_of(1, 512, 512))
    compile_it = [
        sys.executable,
        "-m",
        "clockwork_serve",
        "profile",
        "--no-measure",
        str(root),
        "--cache",
        str(cache),
    ]
    ended = subprocess.run(
        # A limit on file sizes: writing fails half-way, as on a full disk.
        ["prlimit", f"--fsize={256 << 10}", *compile_it],
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    said = ended.stdout + ended.stderr
    assert ended.returncode != 0, said
    assert "large" in said
    assert "Traceback" not in said
    again = run_to_end(compile_it)
    assert again.returncode == 0, again.stdout + again.stderr
