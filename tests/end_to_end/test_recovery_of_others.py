"""Gateways and the supervisor die or stop, models change under load: who is not concerned does not notice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest

from clockwork_serve.serve.supervisor.server import RunningServer, running_server
from harness import machine
from harness.ports import free_port
from tests.end_to_end.commands import alive, command, first_line
from tests.end_to_end.steady import how, steady
from tests.serve.onnx_models import affine, put
from tests.serve.supervisor.servers import call, config, infer, refusal, until

pytestmark = [pytest.mark.system, pytest.mark.slow]

MODELS = ("m0", "m1")
ZERO = np.zeros((1, 64), np.float32)
OF_CLIENTS = ("clockwork-fuzz-", "clockwork-stock-", "clockwork-test-")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("place")
    for at, name in enumerate(MODELS):
        put(root / "repository", name, affine(at))
    return root


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[RunningServer]:
    with running_server(config(place, gateways=2)) as running:
        yield running


@pytest.fixture
def run() -> Iterator[Path]:
    """Where servers make their folders; a short path, for the sockets in them."""
    with tempfile.TemporaryDirectory(prefix="cw") as folder:
        yield Path(folder)


def count(folder: str | Path) -> int:
    return len(list(Path(folder).iterdir()))


def shared() -> list[str]:
    """Named shared memory that could be a server's, and not of clients in tests that run beside this one."""
    names = [path.name for path in Path("/dev/shm").iterdir()]
    return sorted(name for name in names if "clockwork" in name and not name.startswith(OF_CLIENTS))


def regions_of(pid: int) -> int:
    """How many regions of gateways a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text().count("clockwork-region")


def test_a_dozen_killed_gateways_leave_nothing_behind(server: RunningServer) -> None:
    others = {name: server.pid(name) for name in ("controller", "worker-cpu:0", "gateway-0")}
    pids = [os.getpid(), *[pid for pid in others.values() if pid is not None]]

    def killed() -> None:
        pid = server.pid("gateway-1")
        assert pid is not None
        server.server.supervisor.reset_backoff("gateway")
        os.kill(pid, signal.SIGKILL)
        until(lambda: server.pid("gateway-1") not in (None, pid))
        until(lambda: server.state()["gateways"] == ["gateway-0", "gateway-1"])

    with steady(server.http_port, server.grpc_port, MODELS, each=4, pause_s=0.02) as load:
        killed()
        time.sleep(0.5)
        before = [count(f"/proc/{pid}/fd") for pid in pids]
        named, files = shared(), count(server.server.run_dir)
        for _ in range(12):  # more than twice the difference that is allowed
            killed()
        time.sleep(1)
        ends = load.stop()
    torn = {"RemoteDisconnected", "ConnectionResetError", "UNAVAILABLE", "BrokenPipeError"}
    assert {end.how for end in ends if not end.good} <= torn, how(ends)
    assert {name: server.pid(name) for name in others} == others
    worker = others["worker-cpu:0"]
    assert worker is not None
    infer(server, "m0", ZERO)
    until(lambda: regions_of(worker) <= 2)
    after = [count(f"/proc/{pid}/fd") for pid in pids]
    assert all(later <= earlier + 5 for earlier, later in zip(before, after, strict=True)), (before, after)
    assert shared() == named
    assert count(server.server.run_dir) <= files + 2
    until(lambda: server.counters().open == 0)


def test_serving_goes_on_while_the_supervisor_is_stopped_however_much_is_logged(
    tmp_path: Path, run: Path
) -> None:
    for at, name in enumerate(MODELS):
        put(tmp_path / "repository", name, affine(at))
    arguments = [*command(tmp_path / "repository", tmp_path / "cache"), "--log-level", "debug", "--json"]
    environment = os.environ | {"XDG_RUNTIME_DIR": str(run)}
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as supervisor:
        try:
            said = json.loads(first_line(supervisor))
            http = int(said["http"].rpartition(":")[2])
            grpc = int(said["grpc"].rpartition(":")[2])
            supervisor.send_signal(signal.SIGSTOP)
            # What is logged fills the pipes to the supervisor: each turned away is told of.
            with steady(http, grpc, MODELS) as load, closing(HTTPConnection(f"127.0.0.1:{http}")) as bad:
                for _ in range(2000):
                    bad.request("POST", "/v2/models/m0/infer", b"{")
                    with bad.getresponse() as refused:
                        assert refused.status == 400
                        refused.read()
                during = list(load.ends)
                supervisor.send_signal(signal.SIGCONT)
                time.sleep(0.5)
                ends = load.stop()
            assert len(during) > 100
            assert not how(ends)
            call_ready(http)
        finally:
            supervisor.send_signal(signal.SIGCONT)
            supervisor.kill()


def call_ready(port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=60) as reply:
        assert reply.status == 200


def test_after_a_killed_supervisor_the_next_starts_on_the_same_ports_and_clears_what_was_left(
    tmp_path: Path, run: Path
) -> None:
    put(tmp_path / "repository", "m0", affine(0))
    environment = os.environ | {"XDG_RUNTIME_DIR": str(run)}
    ports = ["--http-port", str(free_port()), "--grpc-port", str(free_port())]
    arguments = [*command(tmp_path / "repository", tmp_path / "cache"), *ports, "--json"]
    named = shared()
    for _ in range(3):
        with subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as supervisor:
            try:
                line = first_line(supervisor)
                assert line, supervisor.stderr.read() if supervisor.stderr else ""
                children = machine.children(supervisor.pid)
            finally:
                supervisor.kill()
        assert len(children) >= 3
        assert len(list(run.iterdir())) == 1, "one that is left, of the last one"
    until(lambda: not any(alive(child) for child in children))
    assert shared() == named


def test_models_are_added_replaced_and_removed_under_load_and_nobody_notices(
    server: RunningServer, place: Path
) -> None:
    root = place / "repository"
    put(root, "other", affine(50))
    call(server, "repository/models/other/load", {})
    with steady(server.http_port, server.grpc_port, ("m0", "m1", "other"), pause_s=0.05) as load:
        answers = []
        for turn in range(8):
            if turn % 2:
                # In place, the same version; now and then it is another graph, to be prepared first.
                put(root, "m1", affine(100 + turn, layers=1 + turn % 3), version=turn + 1)
            else:
                put(root, "m1", affine(100 + turn, layers=1 + turn % 4), version=turn + 2)
            call(server, "repository/models/m1/load", {})
            answers.append(float(infer(server, "m1", ZERO)[0, 0]))
            put(root, "added", affine(200 + turn))
            call(server, "repository/models/added/load", {})
            infer(server, "added", ZERO)
            call(server, "repository/models/added/unload", {})
            # The other gateway may hear of it a moment later.
            until(lambda: refusal(server, "models/added/infer", {"inputs": []})[0] == 404)
        assert not how(load.ends), how(load.ends)
        call(server, "repository/models/other/unload", {})
        removed_s = time.monotonic()
        until(
            lambda: (
                {end.protocol for end in load.ends if end.model == "other" and end.sent_s > removed_s}
                == {"http", "grpc"}
            )
        )
        ends = load.stop()
    gone = [end for end in ends if end.model == "other" and end.sent_s > removed_s]
    assert {end.how for end in gone} == {"404", "NOT_FOUND"}, how(gone)
    rest = [end for end in ends if end.model != "other" or end.ended_s < removed_s - 1]
    assert not how(rest), how(rest)
    others = [end for end in ends if end.model == "other" and not end.good and end not in gone]
    assert {end.how for end in others} <= {"404", "NOT_FOUND", "503", "UNAVAILABLE"}, how(others)
    assert len(rest) > 200


def test_a_load_that_races_with_a_dying_worker_ends_and_the_model_is_served(
    server: RunningServer, place: Path
) -> None:
    root, codes = place / "repository", {503}
    for turn in range(4):
        put(root, "raced", affine(300 + turn))
        pid = server.pid("worker-cpu:0")
        assert pid is not None
        server.server.supervisor.reset_backoff("worker")
        killer = subprocess.Popen(["sh", "-c", f"sleep {0.3 * turn}; kill -9 {pid}"])
        try:
            call(server, "repository/models/raced/load", {})
        except urllib.error.HTTPError as refused:
            codes.add(refused.code)
            refused.close()
        killer.wait()
        until(lambda pid=pid: server.pid("worker-cpu:0") not in (None, pid))  # type: ignore[misc]
        server.wait_ready(60)
        until(lambda: served_raced(server), 60)
    assert codes <= {400, 503, 504}


def served_raced(server: RunningServer) -> bool:
    try:
        infer(server, "raced", ZERO)
    except urllib.error.HTTPError as refused:
        refused.close()
        return False
    return True
