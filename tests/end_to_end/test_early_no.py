"""A large request that is hopeless by its head, on a real server: told at once, its body thrown away."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from harness import repositories
from harness.http_load import infer_message
from harness.serving import Serving, total, until

Start = Callable[..., AbstractContextManager[Serving]]

BODY = bytes(600_000)
COUNT = "clockwork_gateway_requests_total"


def test_a_hopeless_request_hears_so_before_its_body_is_sent(tmp_path: Path, start: Start) -> None:
    root = tmp_path / "models"
    repositories.emulated(root, "slow", {1: 3000})
    with start(root, device="emulated") as serving:
        host, port = serving.http_url.rsplit("/", 1)[-1].split(":")
        busy, large = (socket.create_connection((host, int(port)), timeout=60) for _ in range(2))
        with busy, large:
            small = infer_message(serving.http_url, "slow", [("x", "FP32", (1, 4), bytes(16))], slo_ms=20_000)
            busy.sendall(small)
            answered = busy.makefile("rb")
            assert b" 200 " in answered.readline(), "warm"
            busy.sendall(small)
            until("it runs", lambda: total(serving.metrics(), "clockwork_requests_received_total") == 2)

            large.sendall(
                b"POST /v2/models/slow/infer HTTP/1.1\r\nHost: h\r\nx-slo-ms: 2500\r\n"
                b"Content-Length: %d\r\n\r\n" % len(BODY)
            )
            told = large.makefile("rb")
            assert b" 429 " in told.readline(), "and not a byte of the body was sent"
            length = 0
            while (line := told.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            assert json.loads(told.read(length))["reason"] == "would_miss_deadline"
            large.sendall(BODY + b"GET /v2/health/live HTTP/1.1\r\nHost: h\r\n\r\n")
            assert b" 200 " in told.readline()
        until(
            "it is counted",
            lambda: (
                total(serving.metrics(), "clockwork_gateway_requests_total", reason="would_miss_deadline")
                == 1
            ),
        )
