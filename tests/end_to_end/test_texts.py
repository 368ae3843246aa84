"""Whatever text clients send, and models raise, write or are named: no process ends, others are answered."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import grpc
import pytest

from clockwork_serve.oip.protobuf import ModelInferRequest
from harness import repositories
from harness.serving import Serving, total
from tests.end_to_end.conftest import call, x_json

Start = Callable[..., AbstractContextManager[Serving]]

SETTINGS = """
backend = "python"
memory_bytes = 65536
inputs = [{name = "op", dims = [1], datatype = "BYTES"}]
outputs = [{name = "y", dims = [1], datatype = "BYTES"}]
"""
ECHO = """
class Model:
    def load(self, path):
        pass

    def infer(self, inputs):
        return {"y": inputs["op"]}

    def unload(self):
        pass
"""
RAISES = '''"""Raises what its client says."""

import json
import sys


class Fails(BaseException):
    def __str__(self):
        raise SystemExit


class Deleted:
    def __del__(self):
        raise KeyboardInterrupt("\\ud800")


class Model:
    def load(self, path):
        pass

    def infer(self, inputs):
        said = json.loads(inputs["op"].reshape(-1)[0])
        op = said["op"]
        print(op.encode(errors="replace"), "\\x1b[2J", file=sys.stderr)
        match said.get("raise"):
            case "interrupt":
                raise KeyboardInterrupt(op)
            case "exit":
                sys.exit(op)
            case "generator":
                raise GeneratorExit(op)
            case "stop":
                raise StopIteration(op)
            case "fails":
                raise Fails(op)
            case "deleted":
                Deleted()
            case "huge":
                raise ValueError(op * 10_000_000)
            case "deep":
                return self.deeper()
            case "group":
                raise BaseExceptionGroup(op, [SystemExit(op)])
            case "answers":
                return {"y": [op]}
            case "named":
                return {op: 1}
        raise ValueError("unknown op " + op)

    def deeper(self):
        return self.deeper()

    def unload(self):
        raise KeyboardInterrupt
'''
RAISES_AT_LOAD = ECHO.replace("        pass\n", '        raise KeyboardInterrupt("\\ud800")\n', 1)
MEASURED = 'import sys\nMEASURED = any("profile_process" in each for each in sys.orig_argv)\n'
LOADS = MEASURED + RAISES_AT_LOAD.replace("raise", "if not MEASURED: raise", 1)
"""Its load raises later than when it is measured."""
NASTY = {
    "surrogate": "\ud800", "low surrogate": "\udfff", "nul": "a\x00b", "lines": "a\r\nX-Other: b\n\n",
    "escapes": "\x1b]0;title\x07\x1b[2J\x9b2J", "other way": "\u202eabc\u2066", "long": "ab" * 5000,
    "none": "",
    "percent": "%s%n%(name)s{0}{error}", "emoji": "😀" * 700, "markup": "[red]</a>'\"\\",
}  # fmt: skip


def python(root: Path, name: str, source: str, settings: str = SETTINGS) -> None:
    folder = root / name / "1"
    folder.mkdir(parents=True)
    (folder.parent / "clockwork.toml").write_text(settings)
    (folder / "model.py").write_text(source)


def op_json(op: str, **more: str) -> bytes:
    """A request whose one element is JSON, in which a lone surrogate is but an escape."""
    data = [json.dumps({"op": op, **more})]
    tensor = {"name": "op", "shape": [1], "datatype": "BYTES", "data": data}
    return json.dumps({"inputs": [tensor], "parameters": {"slo_ms": 20_000}}).encode()


@contextmanager
def others_answered(serving: Serving) -> Iterator[None]:
    """Another model answers meanwhile, every time, and each process goes on."""
    before, stop, found = serving.pids(), threading.Event(), []
    body = x_json([1.0] * 64, parameters={"slo_ms": 20_000})

    def ask() -> None:
        while not stop.is_set():
            found.append(call(serving.http_url, "/v2/models/m/infer", body).status)
            time.sleep(0.02)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        stop.set()
        asking.join()
    assert set(found) == {200}
    assert serving.pids() == before
    assert total(serving.metrics(), "clockwork_workers_lost_total") == 0


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[Serving]:
    """A good model, and such as raise, are named, or are made of what no model should be."""
    root = tmp_path_factory.mktemp("texts") / "models"
    repositories.one_matrix(root, "m", repositories.matrix_of(1, 64, 16))
    python(root, "raises", RAISES)
    python(root, "loads", LOADS)
    python(root, "unloadable", RAISES_AT_LOAD)
    python(root, "imported", 'raise ValueError("no \\ud800")\n' + ECHO)
    python(root, "exits", "import sys; sys.exit(0)\n" + ECHO)
    python(root, "ends", "import os; os._exit(0)\n" + ECHO)
    python(root, "interrupts", "raise KeyboardInterrupt\n" + ECHO)
    python(root, "source", "\ud800".encode(errors="surrogatepass").decode(errors="replace") + "(((" * 2000)
    python(root, "settings", ECHO, settings='backend = "\x1b[2J"\n')
    python(root, "neighbour", ECHO)
    (root / "neighbour" / "1" / "\udcff\n").touch()
    python(root, "pbtxt", ECHO, settings="")
    (root / "pbtxt" / "config.pbtxt").write_text(
        'backend: "python" input { name: "\\ud800" data_type: TYPE_FP32 dims: 1 }'
    )
    (root / "no\udcfftext\n").mkdir()
    (root / "circle").symlink_to("circle")
    for name in ("pipe", "folder", "empty", "nothing"):
        (root / name / "1").mkdir(parents=True)
    os.mkfifo(root / "pipe" / "1" / "model.onnx")
    (root / "folder" / "1" / "model.onnx").mkdir()
    (root / "empty" / "1" / "model.onnx").write_bytes(b"")
    (root / "nothing" / "1" / "model.onnx").symlink_to("/dev/zero")
    repositories.one_matrix(root, "bytes", repositories.matrix_of(1, 64, 16))
    (root / "bytes" / "clockwork.toml").write_bytes(b"\xff\xfe")
    with start(root, hang_s=30) as found:  # a busy machine takes seconds for the longest texts
        yield found


def test_each_bad_model_is_named_and_the_rest_is_served(serving: Serving) -> None:
    index = call(serving.http_url, "/v2/repository/index", b"{}").json
    ready = {entry["name"] for entry in index if entry["state"] == "READY"}
    named = {entry["name"]: entry["reason"] for entry in index if entry["state"] == "UNAVAILABLE"}
    assert ready == {"m", "raises", "loads", "neighbour"}
    assert set(named) == {
        "imported", "unloadable", "exits", "ends", "interrupts", "source", "settings", "pbtxt",
        r"no\udcfftext\n", "circle", "pipe", "folder", "empty", "nothing", "bytes",
    }  # fmt: skip
    assert all(reason.startswith(f"model '{name}'") for name, reason in named.items())
    assert r"ValueError: no \ud800" in named["imported"]
    with others_answered(serving):
        for name in [*named, "raises"]:
            response = call(serving.http_url, f"/v2/repository/models/{quote(name)}/load", b"{}")
            assert response.status == (200 if name == "raises" else 400), response.json


@pytest.mark.parametrize("op", NASTY.values(), ids=NASTY)
def test_what_a_model_raises_is_that_requests_failure_alone(serving: Serving, op: str) -> None:
    kinds = ("interrupt", "exit", "generator", "stop", "fails", "deleted", "huge", "deep", "group", "named")
    with others_answered(serving):
        for kind in ("", "answers", *kinds):
            response = call(serving.http_url, "/v2/models/raises/infer", op_json(op, **{"raise": kind}))
            sendable = kind == "answers" and op not in ("\ud800", "\udfff")
            assert (kind, response.status) == (kind, 200 if sendable else 500), response.json
            if not sendable:
                assert response.json["reason"] == "model_raised"
                assert response.json["error"].isprintable()
                assert len(response.json["error"]) < 1100
        failed = call(serving.http_url, "/v2/models/loads/infer", op_json(op))
        assert (failed.status, failed.json["reason"]) == (500, "model_raised")


def raw(serving: Serving, message: bytes) -> bytes:
    """The first bytes of what is answered to these; nothing, if the connection ends."""
    host, port = serving.http_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection, suppress(OSError):
        connection.sendall(message)
        return connection.recv(1000)
    return b""


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_what_a_client_writes_over_http_ends_nobody(serving: Serving, text: str) -> None:
    data = text.encode(errors="surrogatepass")
    name, tensor = (
        quote(data, safe=""),
        {"name": "x", "shape": [1, 64], "datatype": "FP32", "data": [1.0] * 64},
    )
    bodies = [
        {"inputs": [tensor], "id": text},
        {"inputs": [tensor], "parameters": {text: text}},
        {"inputs": [tensor], "parameters": {"slo_ms": text}},
        {"inputs": [tensor | {"name": text}]},
        {"inputs": [tensor | {"datatype": text}]},
        {"inputs": [tensor | {"data": [text]}]},
        {"inputs": [tensor], "outputs": [{"name": text}]},
        {text: text},
    ]
    with others_answered(serving):
        for body in bodies:
            for encoded in (json.dumps(body).encode(), json.dumps(body, ensure_ascii=False).encode(
                errors="surrogatepass"
            )):  # fmt: skip
                response = call(serving.http_url, "/v2/models/m/infer", encoded)
                assert response.status in (200, 400), response.json
        for path in (f"/v2/models/{name}/infer", f"/v2/repository/models/{name}/load", f"/v2/{name}"):
            assert call(serving.http_url, path, b"{}").status in (400, 404, 405)
        for header in (b"x-slo-ms", b"Authorization", b"Content-Type", b"Accept-Encoding", b"x-" + data):
            head = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h\r\n%s: %s\r\nContent-Length: 2\r\n\r\n{}"
            raw(serving, head % (header, data))


def test_what_a_client_writes_over_grpc_ends_nobody(serving: Serving) -> None:
    request = ModelInferRequest(model_name="m").SerializeToString()
    with others_answered(serving), grpc.insecure_channel(serving.grpc_url) as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for text in NASTY.values():
            data = text.encode(errors="surrogatepass")
            for field in (b"\x0a", b"\x12", b"\x1a"):  # the model's name and version, the request's id
                size = len(data)
                length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
                with pytest.raises(grpc.RpcError) as caught:
                    ask(request + field + length + data, timeout=60)
                assert caught.value.code() in (
                    grpc.StatusCode.INTERNAL, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT
                )  # fmt: skip
            with pytest.raises((grpc.RpcError, ValueError)):
                ask(request, timeout=60, metadata=(("x-slo-ms", text), ("other-bin", data)))
