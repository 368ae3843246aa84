"""A whole server: it starts, loads and unloads models, and stops."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest

from clockwork_serve.devices import DeviceConfig
from clockwork_serve.errors import ConfigError, RepositoryError
from clockwork_serve.serve.supervisor.server import RunningServer, ServerConfig, StartError, running_server
from tests.serve.onnx_models import affine, put
from tests.serve.supervisor.servers import call, config, infer, refusal, until

# Whole servers: real processes, real models, real clients; killed, drained, loaded and unloaded.


pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a repository of two models and a bad one."""
    root = tmp_path_factory.mktemp("place")
    put(root / "repository", "a", affine(1))
    put(root / "repository", "b", affine(2))
    put(root / "repository", "bad", b"this is no model")
    return root


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[RunningServer]:
    """One server for the tests that leave it running."""
    with running_server(config(place)) as running:
        yield running


def start(settings: ServerConfig, on_line: Callable[[str], None] | None = None) -> None:
    """Start a server that is expected to fail."""
    with running_server(settings, on_line=on_line):
        pass


def served(server: RunningServer, model: str) -> bool:
    try:
        infer(server, model, np.zeros((1, 64), np.float32))
    except urllib.error.HTTPError as refused:
        refused.close()
        return False
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


def test_answers_equal_a_plain_session(server: RunningServer, place: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    for name in ("a", "b"):
        path = place / "repository" / name / "1" / "model.onnx"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(
            infer(server, name, x), session.run(None, {"x": x})[0], rtol=1e-4, atol=1e-5
        )


def test_the_index_says_what_is_wrong(server: RunningServer) -> None:
    index = {entry["name"]: entry for entry in call(server, "repository/index", {})}
    assert (index["a"]["state"], index["b"]["state"]) == ("READY", "READY")
    assert index["bad"]["state"] == "UNAVAILABLE"
    assert "bad" in index["bad"]["reason"]


def test_models_are_loaded_replaced_and_unloaded_while_it_serves(server: RunningServer, place: Path) -> None:
    root = place / "repository"
    x = np.ones((1, 64), np.float32)
    put(root, "new", affine(3))
    call(server, "repository/models/new/load", {})
    first = infer(server, "new", x)
    put(root, "new", affine(4), version=2)
    call(server, "repository/models/new/load", {})
    assert not np.allclose(infer(server, "new", x), first)
    call(server, "repository/models/new/unload", {})
    status, _ = refusal(server, "models/new/infer", {"inputs": []})
    assert 400 <= status < 500
    call(server, "repository/models/new/unload", {})  # as it is already
    for verb in ("load", "unload"):
        status, why = refusal(server, f"repository/models/nobody/{verb}", {})
        assert (status, f"failed to {verb} 'nobody', failed to poll" in why) == (404, True)
    status, why = refusal(server, "repository/models/new/load", {"parameters": {"mode": "fast"}})
    assert (status, "'mode'" in why) == (400, True)
    (root / "broken" / "1").mkdir(parents=True)
    (root / "broken" / "1" / "model.onnx").write_bytes(b"no graph")
    assert refusal(server, "repository/models/broken/load", {})[0] == 400
    index = {entry["name"]: entry for entry in call(server, "repository/index", {})}
    assert index["broken"]["state"] == "UNAVAILABLE"
    assert "model.onnx" in index["broken"]["reason"]
    assert index["new"] == {"name": "new", "version": "2", "state": "UNAVAILABLE", "reason": "unloaded"}
    assert index["a"] == {"name": "a", "version": "1", "state": "READY"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for name in ("nobody", "..%2F..%2Fetc", "new%2F1"):
        status, why = refusal(server, f"repository/models/{name}/load", {})
        assert (status, "no model of that name" in why) == (404, True)
    # No process was started to look for them, and ended: that takes a second.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime == before.ru_utime


def test_a_load_of_which_a_version_fails_says_so_and_serves_the_others(
    server: RunningServer, place: Path
) -> None:
    def states(name: str) -> dict[str, str]:
        index = call(server, "repository/index", {})
        return {entry["version"]: entry["state"] for entry in index if entry["name"] == name}

    root = place / "repository"
    x = np.ones((1, 64), np.float32)
    for name, policy in (("every", "all"), ("newest", "latest")):
        put(root, name, affine(3))
        (root / name / "clockwork.toml").write_text(f'version_policy = "{policy}"')
        call(server, f"repository/models/{name}/load", {})
        put(root, name, affine(4), version=2)
        (root / name / "2" / "model.onnx").write_bytes(b"no graph")
        status, why = refusal(server, f"repository/models/{name}/load", {})
        assert status == 400
        assert f"load failed for model '{name}': version 2 is at UNAVAILABLE state: " in why
        assert ("(served now: 1)" in why) == (policy == "all")
        assert states(name) == {"1": "READY", "2": "UNAVAILABLE"}
        assert infer(server, name, x).shape == (1, 64)
    (root / "newest" / "clockwork.toml").write_text("nonsense = 1")
    status, why = refusal(server, "repository/models/newest/load", {})
    assert (status, "failed to load 'newest', failed to poll from model repository: " in why) == (400, True)
    assert states("newest") == {"1": "READY"}
    put(root, "every", affine(4), version=2)
    call(server, "repository/models/every/load", {})
    assert states("every") == {"1": "READY", "2": "READY"}


@pytest.mark.parametrize("name", ["worker-cpu:0", "gateway-0", "controller"])
def test_every_process_that_is_killed_is_restarted(server: RunningServer, name: str) -> None:
    assert served(server, "a")
    pid = server.pid(name)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: server.pid(name) not in (None, pid))
    server.wait_ready(60)
    until(lambda: served(server, "a"))


def listening(port: int) -> int:
    """How many sockets listen there."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines)


def test_gateways_have_as_many_connections_each_and_one_that_died_gets_the_next(place: Path) -> None:
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.0] * 64}
    body = json.dumps({"inputs": [entry]})
    with running_server(config(place, gateways=2)) as running, ExitStack() as stack:

        def answered_by(count: int) -> Counter[str]:
            """Which gateways answer on this many new connections, which stay open."""
            names: Counter[str] = Counter()
            for _ in range(count):
                client = stack.enter_context(closing(HTTPConnection("127.0.0.1", running.http_port)))
                client.request("POST", "/v2/models/a/infer", body)
                reply = client.getresponse()
                assert json.loads(reply.read())["model_name"] == "a"
                names["-".join(reply.headers["Clockwork-Request-Id"].split("-")[:2])] += 1
            return names

        assert answered_by(8) == {"gateway-0": 4, "gateway-1": 4}
        pid = running.pid("gateway-1")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{pid}").exists())
        between = answered_by(2)  # whom nobody else takes the first keeps
        until(lambda: running.pid("gateway-1") not in (None, pid))
        until(lambda: running.state()["gateways"] == ["gateway-0", "gateway-1"])
        until(lambda: listening(running.http_port) == 2)  # it has a link a moment before
        assert between + answered_by(6) == {"gateway-0": 2, "gateway-1": 6}


def test_it_stops_and_leaves_nothing_behind(place: Path) -> None:
    with running_server(config(place, gateways=2)) as running:
        pids = [running.pid(name) for name in running.names]
        run_dir = running.server.run_dir
        assert run_dir.stat().st_mode & 0o777 == 0o700
        assert len(running.names) == 5
        assert served(running, "a")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not run_dir.exists()


def test_it_is_closed_when_its_own_work_has_ended(place: Path) -> None:
    ended: list[bool] = []

    async def work() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            await asyncio.sleep(0.3)  # as a child takes to end
            ended.append(True)

    with running_server(config(place)) as running:
        running._loop.call_soon_threadsafe(lambda: running.server._run(work()))
        infer(running, "a", np.zeros((1, 64), np.float32))  # the task has begun
    assert ended


def test_a_taken_port_is_refused_before_anything_starts(place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"http_port: expected a free port; found {port}"):
            start(config(place, http_port=port))


def test_a_repository_with_nothing_to_serve_is_refused(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    with pytest.raises(RepositoryError, match=r"served:\n  repository: models: expected each model at"):
        start(config(tmp_path))
    put(tmp_path / "repository", "bad", b"no model")
    with pytest.raises(RepositoryError, match=r"no model can be served:\s+model 'bad'"):
        start(config(tmp_path))
    assert not list(tmp_path.glob("clockwork-*"))


def test_a_server_whose_devices_can_run_none_of_its_models_is_refused_with_what_to_set(place: Path) -> None:
    small = DeviceConfig(device="cpu:0", workspace_bytes=(1 << 20) - 1)
    needs = r"no model can be served:\n  model a/1: no device can run it: batch 1 needs \d+ bytes of scratch"
    with pytest.raises(StartError, match=rf"{needs} .*: set scratch_memory to at least 5MiB\n  model b/1: "):
        start(config(place, devices=(small,)))


def test_a_process_that_cannot_run_is_reported_with_its_last_lines(place: Path) -> None:
    odd = DeviceConfig(device="cpu:0", page_bytes=1000)
    lines: list[str] = []
    with pytest.raises(StartError, match=r"worker-cpu:0 cannot run"):
        start(config(place, devices=(odd,)), on_line=lines.append)
    assert lines


PROGRAM = """
import sys, msgspec
from clockwork_serve.serve.supervisor.server import ServerConfig, run
def ready(server):
    print("ready", server.http_url, flush=True)
sys.exit(run(msgspec.json.decode(sys.argv[1], type=ServerConfig), on_ready=ready))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it(place: Path, tmp_path: Path, number: signal.Signals) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    settings = msgspec.json.encode(config(place, run_dir=str(run_dir))).decode()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, settings], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("ready http://127.0.0.1:")
        process.send_signal(number)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert not list(run_dir.iterdir())
