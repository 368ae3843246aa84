"""Processes that are stopped: the server says so, ends them, and serves again; one paused whole goes on."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from clockwork_serve.serve.supervisor.server import RunningServer, running_server
from harness import machine
from harness.serving import read_metrics, total
from tests.end_to_end.commands import command, first_line
from tests.end_to_end.steady import how, steady
from tests.serve.onnx_models import affine, put
from tests.serve.supervisor.servers import config, infer, until
from tests.timing import Timing

pytestmark = pytest.mark.system

ZERO = np.zeros((1, 64), np.float32)
ENDED = "clockwork_processes_ended_total"
REFUSED = {"429", "503", "504", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stuck")
    put(root / "repository", "m0", affine(0))
    return root


class Probes:
    """Asks whether the server is ready, on a new connection each time."""

    def __init__(self, port: int) -> None:
        self.found: list[int | None] = []  # None: no answer
        self._port = port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
            try:
                connection.request("GET", "/v2/health/ready")
                self.found.append(connection.getresponse().status)
            except (OSError, http.client.HTTPException):
                self.found.append(None)
            finally:
                connection.close()


def stop_and_see_another(server: RunningServer, name: str) -> None:
    """Stop a process, and wait until there is another one and all serve."""
    before = {each: server.pid(each) for each in server.names}
    victim = before.pop(name)
    assert victim is not None
    os.kill(victim, signal.SIGSTOP)
    until(lambda: server.pid(name) not in (None, victim))
    server.wait_ready()
    infer(server, "m0", ZERO)
    assert {each: server.pid(each) for each in before} == before, "the others were left alone"
    assert server.server.supervisor.unresponsive[name] == 1


def test_a_stopped_controller_is_said_to_be_and_another_one_serves(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_server(config(place)) as server:
        probes = Probes(server.http_port)
        with probes.running(), steady(server.http_port, server.grpc_port, ["m0"], slo_ms=200) as load:
            until(lambda: len(load.ends) > 50)
            stop_and_see_another(server, "controller")
            seen = len(load.ends)
            until(lambda: sum(end.good for end in load.ends[seen:]) > 50)
            ends = load.stop()
        assert set(probes.found) == {200, 503}, "never unanswered"
        assert {end.how for end in ends if not end.good} <= REFUSED, how(ends)
        # The next one was told, for it could not have counted itself.
        until(lambda: total(server_metrics(server), ENDED, process="controller") == 1)
    assert "controller does not answer: it has been stopped by a signal" in caplog.text


def server_metrics(server: RunningServer) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return read_metrics(server.metrics_url)


@pytest.mark.parametrize("gateways", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stopped_gateway_is_replaced(place: Path, gateways: int) -> None:
    with running_server(config(place, gateways=gateways)) as server:
        stop_and_see_another(server, f"gateway-{gateways - 1}")
        until(lambda: total(server_metrics(server), ENDED, process=f"gateway-{gateways - 1}") == 1)


@contextmanager
def commanded(place: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """``clockwork serve``, and its HTTP port."""
    with tempfile.TemporaryDirectory(prefix="cw") as run:
        environment = os.environ | {"XDG_RUNTIME_DIR": run}
        arguments = [*command(place / "repository", place / "cache"), "--json", *more]
        with subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        ) as supervisor:
            try:
                yield supervisor, int(json.loads(first_line(supervisor))["http"].rpartition(":")[2])
            finally:
                pids = [*machine.children(supervisor.pid), supervisor.pid]
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
                supervisor.kill()


def test_who_loads_a_model_hears_that_the_supervisor_is_stopped(place: Path) -> None:
    with commanded(place) as (supervisor, port):
        supervisor.send_signal(signal.SIGSTOP)
        arguments = ["models", "--url", f"http://127.0.0.1:{port}", "load", "m0"]
        said = subprocess.run(
            [sys.executable, "-m", "clockwork_serve", *arguments],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert said.returncode != 0
        assert f"the supervisor (process {supervisor.pid}) has not answered for" in said.stderr, said
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=60) as reply:
            assert reply.status == 200, "serving goes on"
        supervisor.send_signal(signal.SIGCONT)
        body = b'{"ready":true}'

        def answers() -> bool:
            asked = urllib.request.Request(f"http://127.0.0.1:{port}/v2/repository/index", data=body)
            try:
                with urllib.request.urlopen(asked, timeout=60) as reply:
                    return bool(json.load(reply))
            except OSError:
                return False

        until(answers)


@pytest.mark.slow
def test_a_pause_of_the_whole_server_ends_nobody(place: Path, timing: Timing) -> None:
    with commanded(place) as (supervisor, port):
        pids = sorted(machine.children(supervisor.pid))
        assert len(pids) == 5, "controller, worker, gateway, observer, guard"
        for order in (1, -1):
            for pid in [supervisor.pid, *pids][::order]:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(5)
            for pid in [supervisor.pid, *pids]:
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.1)
            time.sleep(4)
            with timing.judged():
                assert sorted(machine.children(supervisor.pid)) == pids
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=60) as reply:
            assert reply.status == 200


@pytest.mark.slow
def test_who_wants_to_look_at_a_stopped_process_may_switch_that_off(place: Path) -> None:
    with commanded(place, "--watchdog-s", "0") as (supervisor, port):
        pids = sorted(machine.children(supervisor.pid))
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(6)
        assert sorted(machine.children(supervisor.pid)) == pids
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

        def ready() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=60) as reply:
                    return bool(reply.status == 200)
            except OSError:
                return False

        until(ready)
