"""Traces of a real server, at a real collector: nobody who was refused or late is missing, nor any parent."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from harness import repositories
from harness.serving import Serving
from tests.end_to_end.conftest import Response, call, x_json

Start = Callable[..., AbstractContextManager[Serving]]
INFER = "/v2/models/slow/infer"


@contextmanager
def collector(file: Path) -> Iterator[str]:
    """The URL of a collector, a process of its own; what it got is in the file afterwards."""
    command = [sys.executable, "-m", "harness.collector", str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def parent(flags: str = "01") -> tuple[str, str]:
    """A trace of a client, and its header."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    return trace, f"00-{trace}-{span}-{flags}"


def ask(server: Serving, path: str = INFER, **headers: str) -> Response:
    return call(server.http_url, path, x_json([1.0, 2.0, 3.0, 4.0]), headers)


def crowd(server: Serving, *, count: int, slo_ms: int) -> list[Response]:
    found: list[Response] = []
    threads = [
        threading.Thread(target=lambda: found.append(ask(server, **{"x-slo-ms": str(slo_ms)})))
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    repositories.sleeper(root, "slow", 0.05)
    return root


def test_every_span_has_its_parent_and_no_refused_or_late_request_is_missing(
    slow: Path, start: Start, tmp_path: Path
) -> None:
    file = tmp_path / "spans"
    good, good_header = parent()
    quiet, quiet_header = parent("00")
    wrong, wrong_header = parent("00")
    grpc_trace, grpc_header = parent()
    with collector(file) as url, start(slow, otlp_endpoint=url, trace_sample=1.0) as server:
        assert ask(server, traceparent=good_header, tracestate="a=1").status == 200
        assert ask(server, traceparent=quiet_header).status == 200
        ended = [call(server.http_url, INFER, b"{}", {"traceparent": wrong_header})]
        ended.append(ask(server, "/v2/models/nobody/infer"))
        over_grpc(server, grpc_header)
        ended += crowd(server, count=60, slo_ms=400)
        ended += late(server)
    spans = [json.loads(line) for line in file.read_text().splitlines()]

    roots = {
        one["attributes"]["clockwork.request"]: one for one in spans if one["name"] == "clockwork.request"
    }
    bad = {one.headers["clockwork-request-id"]: one.json["reason"] for one in ended if one.status != 200}
    assert {"bad_input", "unknown_model", "would_miss_deadline", "late"} <= set(bad.values())
    assert {name: roots[name]["attributes"].get("clockwork.reason", "") for name in bad} == bad
    assert all(roots[name]["error"] for name in bad)
    ids = {(one["trace"], one["span"]) for one in spans}
    assert len(ids) == len(spans)
    assert all((one["trace"], one["parent"]) in ids for one in spans if one["name"] != "clockwork.request")
    by_trace = {one["trace"]: one for one in roots.values()}
    assert by_trace[good]["parent"] == good_header.split("-")[2]
    assert by_trace[good]["state"] == "a=1"
    assert by_trace[wrong]["parent"] == wrong_header.split("-")[2]
    assert by_trace[grpc_trace]["attributes"]["clockwork.outcome"] == "ok"
    assert quiet not in by_trace
    assert abs(by_trace[good]["end_ns"] - time.time_ns()) < 300e9


def over_grpc(server: Serving, header: str) -> None:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        tensor = tritonclient.grpc.InferInput("x", [1, 4], "FP32")
        tensor.set_data_from_numpy(np.ones((1, 4), np.float32))
        client.infer("slow", [tensor], headers={"traceparent": header})
        with pytest.raises(InferenceServerException):
            client.infer("slow", [tensor], headers={"x-slo-ms": "nonsense"})


def late(server: Serving) -> list[Response]:
    """Answers that their gateway could not write in time, for it was stopped.

    Again and again until there is one: it may be stopped before it has read the requests, too.
    """
    found: list[Response] = []
    pid = server.server.pid("gateway-0")
    assert pid is not None
    for _ in range(20):
        asking = threading.Thread(target=lambda: found.extend(crowd(server, count=2, slo_ms=300)))
        asking.start()
        time.sleep(0.005)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(pid, signal.SIGCONT)
        asking.join()
        if any(one.status != 200 and one.json["reason"] == "late" for one in found):
            break
    return found
