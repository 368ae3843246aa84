"""A server's observer: it is there by default, costs the server nothing, and may die at any time."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from clockwork_serve.serve.transport import OBSERVER_SOCKET
from harness import repositories
from harness.http_load import closed_loop, infer_message, run
from harness.serving import Serving, serve, until
from tests.end_to_end.conftest import PATIENT_SLO_MS


@pytest.fixture
def models(tmp_path: Path) -> Path:
    repositories.emulated(tmp_path / "models", "m", {1: 1.0, 2: 1.5, 4: 2.5})
    return tmp_path / "models"


def ask(serving: Serving, **asked: object) -> Any:
    """The observer's answer; None while it does not answer."""
    path = serving.server.server.run_dir / OBSERVER_SOCKET
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(30)
        try:
            link.connect(str(path))
            link.sendall(json.dumps(asked).encode() + b"\n")
            answer = link.makefile().readline()
        except OSError:
            return None
    return json.loads(answer) if answer else None


def asked(serving: Serving) -> str:
    """The id of a request that was answered."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}
    body = json.dumps({"inputs": [tensor], "parameters": {"slo_ms": PATIENT_SLO_MS}}).encode()
    url = f"{serving.http_url}/v2/models/m/infer"
    with urllib.request.urlopen(url, body, timeout=60) as response:
        return str(response.headers["Clockwork-Request-Id"])


def ends(serving: Serving, requests: int) -> dict[str, int]:
    """How requests of eight clients ended, each with the next one when it has an answer."""
    message = infer_message(serving.http_url, "m", [("x", "FP32", (1, 4), bytes(16))], slo_ms=PATIENT_SLO_MS)
    report = run(closed_loop(serving.http_url, lambda at: message, requests=requests, connections=8))
    assert not report.unanswered
    return dict(report.ends())


def test_it_follows_the_journal_in_memory_and_finds_requests(models: Path) -> None:
    with serve(models, device="emulated") as serving:
        until("it answers", lambda: ask(serving, ask="status"))
        pid = serving.server.pid("observer")
        assert pid is not None
        assert os.sched_getscheduler(pid) == os.SCHED_IDLE
        assert ends(serving, 200) == {"200": 200}
        name = asked(serving)
        found = until("it finds the last request", lambda: ask(serving, ask="find", request_id=name), 60)
        until("it has read all", lambda: ask(serving, ask="status")["history"]["next"] > found["record"], 60)
        run_dir = serving.server.server.run_dir
        assert (run_dir / "journal").stat().st_mode & 0o777 == 0o600
        assert (run_dir / OBSERVER_SOCKET).stat().st_mode & 0o777 == 0o600
        told = ask(serving, ask="explain", request_id=name)
        assert told["sentence"].startswith("Its answer was ready ")
        assert told["devices"][0]["device"].startswith("emulated")
        page = serving.server.metrics_url.removesuffix("/metrics")
        with urllib.request.urlopen(f"{page}/live/explain?id={name}", timeout=60) as response:
            assert json.load(response)["sentence"] == told["sentence"]
        with urllib.request.urlopen(f"{page}/", timeout=60) as response:
            assert b"<script" in response.read()
        assert ask(serving, ask="explain", request_id=name, tenant="another") is None
        assert ask(serving, ask="explain", request_id="nobody") is None
        assert ask(serving, ask="find", request_id="nobody") is None
        assert "expected one of explain, find, status" in ask(serving, ask="nothing")["error"]


def test_requests_do_not_notice_that_it_is_killed_and_it_comes_again(models: Path, tmp_path: Path) -> None:
    with serve(models, device="emulated", journal=tmp_path / "journal") as serving:
        until("it answers", lambda: ask(serving, ask="status"))
        pids = set()
        for _ in range(3):
            pid = until("it runs", lambda: serving.server.pid("observer"))
            pids.add(pid)
            os.kill(pid, signal.SIGKILL)
            assert ends(serving, 300) == {"200": 300}
            until("another one runs", lambda: serving.server.pid("observer") not in pids | {None}, 60)
        found = until("it answers again", lambda: ask(serving, ask="status"), 60)
        assert found["history"]["failed"] == ""


def test_requests_do_not_notice_that_it_is_stopped_and_it_is_replaced(models: Path) -> None:
    with serve(models, device="emulated") as serving:
        until("it answers", lambda: ask(serving, ask="status"))
        before = asked(serving)
        pid = serving.server.pid("observer")
        os.kill(pid or 0, signal.SIGSTOP)
        assert ends(serving, 300) == {"200": 300}
        until("another one runs", lambda: serving.server.pid("observer") not in {pid, None}, 60)
        for name in (before, asked(serving)):
            line = {"ask": "explain", "request_id": name, "if": ["priority=1"]}
            told = until("it explains", partial(ask, serving, **line), 60)
            assert told["sentence"].startswith("Its answer was ready ")
            assert told["changed"]["outcome"] == "ok"


def test_a_server_whose_observer_cannot_run_is_ready_and_serves(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "clockwork_serve.serve.supervisor.processes.OBSERVER", "clockwork_serve.no_such_module"
    )
    with serve(models, device="emulated") as serving:
        time.sleep(3)
        assert ends(serving, 50) == {"200": 50}
