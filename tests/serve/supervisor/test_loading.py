"""A server that starts: it is live at once, serves each model when it is ready, and is ready when all are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from clockwork_serve.serve.supervisor import loading
from clockwork_serve.serve.supervisor.server import ServerConfig, StartProgress, running_server
from harness import machine, repositories
from harness.ports import free_port
from harness.serving import read_metrics, total
from tests.end_to_end.commands import SMALL
from tests.serve.onnx_models import affine, put
from tests.serve.supervisor.servers import config, infer, until

pytestmark = pytest.mark.system

SLOW = repositories.echoing(
    """
    import pathlib, time

    while not pathlib.Path(GATE).exists():
        time.sleep(0.02)
    """
)
"""A class whose import takes until a file is there."""
ROW = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0, 2.0, 3.0, 4.0]}]}


class Starting:
    """A server that starts in a thread, as a client sees it."""

    def __init__(self) -> None:
        self.url = ""
        self.steps: list[StartProgress] = []
        self.error: Exception | None = None
        self.over = threading.Event()

    def run(self, settings: ServerConfig) -> None:
        try:
            with running_server(settings, on_progress=self.note, on_line=lambda line: None):
                self.over.wait()
        except Exception as error:  # noqa: BLE001 - told to the test
            self.error = error

    def note(self, step: StartProgress) -> None:
        self.steps.append(step)
        if not self.url:
            self.url = step.text.split(" at ")[1].split()[0]

    def ask(self, path: str, body: object = None) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers; 0 if nobody answers."""
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{self.url}/v2/{path}", data)) as reply:
                return reply.status, json.loads(reply.read() or b"null"), dict(reply.headers)
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, json.loads(refused.read() or b"null"), dict(refused.headers)
        except (OSError, urllib.error.URLError):
            return 0, None, {}

    def status(self, path: str, body: object = None) -> int:
        return self.ask(path, body)[0]


def child_of(module: str, place: Path) -> int:
    """The process that runs that module, of the server whose repository is there."""
    (found,) = [
        pid
        for pid in machine.children(os.getpid())
        if (line := Path(f"/proc/{pid}/cmdline").read_bytes())
        and all(part.encode() in line for part in (f"clockwork_serve.serve.{module}", f"{place}/"))
    ]
    return found


@contextmanager
def starting(settings: ServerConfig) -> Iterator[Starting]:
    found = Starting()
    thread = threading.Thread(target=found.run, args=(settings,))
    thread.start()
    try:
        until(lambda: found.url or found.error)
        yield found
    finally:
        found.over.set()
        thread.join()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two ONNX models of one graph, one of another, a bad one, and one that takes long."""
    root = tmp_path / "repository"
    put(root, "a", affine(1))
    put(root, "b", affine(2))
    put(root, "c", affine(3, layers=2))
    put(root, "bad", b"this is no model")
    repositories.python_model(root, "slow", SLOW.replace("GATE", repr(str(tmp_path / "gate"))))
    return tmp_path


def test_models_are_served_as_they_are_ready(place: Path) -> None:
    with starting(config(place)) as found:
        until(lambda: found.status("health/live") == 200)
        until(lambda: found.status("models/a/ready") == 200)
        until(lambda: found.status("models/c/ready") == 200)
        status, body, _ = found.ask("health/ready")
        assert (status, body) == (
            503,
            {
                "error": "not ready: models are being prepared, 4 of 5 are done",
                "models_prepared": 4, "models": 5,
            },
        )  # fmt: skip
        x = {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}
        assert found.status("models/a/infer", {"inputs": [x]}) == 200
        status, body, headers = found.ask("models/slow/infer", ROW)
        assert (status, body["reason"]) == (503, "not_serving")
        assert body["error"] == "not_serving: model slow is being prepared, 4 of 5 models are done"
        assert int(headers["Retry-After"]) >= 1
        for path in ("models/slow/ready", "models/slow", "models/slow/config", "models/slow/stats"):
            assert found.status(path) == 503
        assert found.status("models/nobody/ready") == 404
        index = {one["name"]: one for one in found.ask("repository/index", {})[1]}
        assert [index[name]["state"] for name in ("a", "bad", "slow")] == ["READY", "UNAVAILABLE", "LOADING"]
        assert {one["name"] for one in found.ask("repository/index", {"ready": True})[1]} == {"a", "b", "c"}
        (place / "gate").touch()
        until(lambda: found.status("health/ready") == 200)
        assert found.status("models/slow/infer", ROW) == 200
        assert found.ask("health/ready")[1] == {"ready": True}
    assert found.error is None
    assert [(step.stage, step.done, step.total) for step in found.steps][-1] == ("start", 1, 1)
    assert ("prepare", 5, 5) in [(step.stage, step.done, step.total) for step in found.steps]


def test_metrics_and_grpc_say_what_http_says(place: Path) -> None:
    grpc_port, metrics_port = free_port(), free_port()
    metrics = f"http://127.0.0.1:{metrics_port}/metrics"
    settings = config(place, grpc_port=grpc_port, metrics_port=metrics_port)
    with starting(settings) as found, InferenceServerClient(f"127.0.0.1:{grpc_port}") as client:
        until(lambda: found.status("models/c/ready") == 200)
        until(lambda: total(read_metrics(metrics), "clockwork_models_waiting") == 1)
        assert total(read_metrics(metrics), "clockwork_ready") == 0
        assert total(read_metrics(metrics), "clockwork_models") == 3
        assert (client.is_server_live(), client.is_server_ready()) == (True, False)
        assert (client.is_model_ready("a"), client.is_model_ready("slow")) == (True, False)
        with pytest.raises(InferenceServerException, match=r"UNAVAILABLE.*is being prepared, 4 of 5"):
            client.get_model_metadata("slow")
        index = {one.name: one for one in client.get_model_repository_index().models}
        assert (index["a"].state, index["slow"].state) == ("READY", "LOADING")
        assert index["slow"].reason == "it is being prepared"
        (place / "gate").touch()
        until(client.is_server_ready)
        page = read_metrics(metrics)
        assert (total(page, "clockwork_ready"), total(page, "clockwork_models_waiting")) == (1, 0)


def test_a_model_that_waits_may_be_unloaded_or_loaded(place: Path) -> None:
    repositories.python_model(
        place / "repository", "slow2", SLOW.replace("GATE", repr(str(place / "gate"))) + "\nX = 1\n"
    )
    with starting(config(place)) as found:
        until(lambda: found.status("models/c/ready") == 200)
        assert found.status("repository/models/slow2/unload", {}) == 200
        assert found.status("models/slow2/ready") == 404
        (place / "gate").touch()
        assert found.status("repository/models/slow/load", {}) == 200
        assert found.status("models/slow/infer", ROW) == 200
        until(lambda: found.status("health/ready") == 200)
        assert found.status("models/slow2/ready") == 404, "it was unloaded before it was prepared"


def test_a_signal_stops_it_while_models_are_prepared(place: Path) -> None:
    port = free_port()
    command = [
        sys.executable, "-m", "clockwork_serve", "serve", str(place / "repository"), "--http-port", str(port),
        "--grpc-port", "0", "--metrics-port", "0", "--cache", str(place / "cache"), *SMALL,
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            found = Starting()
            found.url = f"http://127.0.0.1:{port}"
            until(lambda: found.status("models/c/ready") == 200)
            process.send_signal(signal.SIGTERM)
            out, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 143
    assert f"preparing 0/5: models are served at {found.url} as they are ready" in said
    assert (out, "Traceback" in said) == ("", False)


def test_a_controller_that_dies_meanwhile_is_told_what_is_still_to_be_prepared(place: Path) -> None:
    with starting(config(place)) as found:
        until(lambda: found.status("models/c/ready") == 200)
        os.kill(child_of("processes.controller", place), signal.SIGKILL)
        until(lambda: found.status("models/a/ready") != 200)
        until(lambda: found.status("models/a/ready") == 200)
        assert "being prepared, 4 of 5" in found.ask("health/ready")[1]["error"]
        (place / "gate").touch()
        until(lambda: found.status("health/ready") == 200)


def test_preparing_that_is_killed_begins_again(place: Path) -> None:
    with starting(config(place)) as found:
        until(lambda: found.status("models/c/ready") == 200)
        child = child_of("supervisor.preparation", place)
        os.kill(child, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{child}").exists())
        (place / "gate").touch()
        until(lambda: found.status("health/ready") == 200)
        assert found.status("models/slow/infer", ROW) == 200
        assert found.status("models/bad/ready") == 404


def test_profiles_measured_beside_other_work_are_measured_again_once_no_request_comes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "REFINE_POLL_S", 0.2)
    monkeypatch.setattr(loading, "REFINE_IDLE_S", 1.0)
    (place / "gate").touch()
    with running_server(config(place)) as server:

        def times() -> dict[str, int]:
            return {path.name: path.stat().st_mtime_ns for path in (place / "cache").rglob("profiles/*.json")}

        before = times()
        assert len(before) == 3, "one for each code"
        rough = server.server._loader._rough
        assert len(rough) == 3
        until(lambda: not rough)
        assert all(times()[name] > before[name] for name in before)
        assert infer(server, "a", np.ones((1, 64), np.float32)).shape == (1, 64)
    with running_server(config(place)) as server:
        assert not server.server._loader._rough, "they are in the cache"
