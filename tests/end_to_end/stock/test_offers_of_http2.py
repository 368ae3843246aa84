"""Clients that offer HTTP/2 beside a request, as they are: the answer is HTTP/1.1 (RFC 9110, 7.8)."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.serving import Serving

JAVA = shutil.which("java")
CURL = shutil.which("curl")
CLIENT = Path(__file__).with_name("OrdinaryClient.java")
LEAST_JAVA = 11
RUN_S = 120
ECHO = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1.5, -2, 3]}]}


def no_java() -> str:
    """Why Java's client cannot be run."""
    if JAVA is None:
        return "java is not here"
    told = subprocess.run([JAVA, "-version"], capture_output=True, text=True, check=False).stderr
    version = told.partition('"')[2].partition('"')[0].partition(".")[0]
    return (
        "" if version.isdigit() and int(version) >= LEAST_JAVA else f"java is older than {LEAST_JAVA}: {told}"
    )


def no_curl() -> str:
    """Why curl cannot offer HTTP/2."""
    if CURL is None:
        return "curl is not here"
    told = subprocess.run([CURL, "--version"], capture_output=True, text=True, check=False).stdout
    return "" if "HTTP2" in told else "this curl has no HTTP/2"


def ran(*command: str, **more: str) -> Iterator[str]:
    """The lines that it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False, **more)
    assert done.returncode == 0, done.stderr
    yield from done.stdout.splitlines()


@pytest.mark.skipif(bool(no_java()), reason=no_java() or "Java is here")
def test_the_client_of_the_jdk_with_its_defaults(stock_server: Serving) -> None:
    assert JAVA is not None
    answers = [line.split(" ", 2) for line in ran(JAVA, str(CLIENT), stock_server.http_url)]
    assert [(status, version) for status, version, _ in answers] == [("200", "HTTP_1_1")] * 10
    bodies = [json.loads(body) for _, _, body in answers]
    assert bodies.pop(3) == {"live": True}
    assert [body["outputs"][0]["data"] for body in bodies] == [[1.5, -2, 3]] * 9


@pytest.mark.skipif(bool(no_curl()), reason=no_curl() or "curl is here")
@pytest.mark.parametrize("spaces", [0, 67_000], ids=["small", "large"])
@pytest.mark.parametrize("headers", [(), ("Transfer-Encoding: chunked",), ("Expect: 100-continue",)])
def test_curl_that_offers_http2(
    stock_server: Serving, tmp_path: Path, headers: tuple[str, ...], spaces: int
) -> None:
    assert CURL is not None
    body = tmp_path / "body.json"
    body.write_text(json.dumps(ECHO).replace("[1.5", "[" + " " * spaces + "1.5"))
    url = f"{stock_server.http_url}/v2/models/echo_FP32/infer"
    options = [part for header in headers for part in ("-H", header)]
    command = [CURL, "-sS", "--http2", *options, "-w", "%{http_version} %{http_code}\n"]
    # Two on one connection, the second of which offers nothing any more.
    both = ["--data-binary", f"@{body}", url, "--next", *command[1:], "--data-binary", f"@{body}", url]
    first, second = ran(*command, *both)
    for told in (first, second):
        answer, _, end = told.rpartition("}")
        assert end == "1.1 200"
        assert json.loads(answer + "}")["outputs"][0]["data"] == [1.5, -2, 3]
