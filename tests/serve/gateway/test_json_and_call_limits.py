"""JSON, calls and idle streams beyond the limits: the errors that clients get; others are served."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from clockwork_serve.oip.protobuf import HEALTH_SERVICE, INFERENCE_SERVICE
from clockwork_serve.units import KIB, MIB
from qa.hostile import frames as hostile_frames
from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.serve.http.requests import INFER, ask, post

JSON_BYTES = 100 * KIB
SILENT_S = 0.4
CALLS = 2
ANY = "/v2/models/any/infer"
STREAM = f"/{INFERENCE_SERVICE}/ModelStreamInfer"
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(
        tmp_path_factory.mktemp("gateway"),
        max_json=JSON_BYTES,
        max_calls=CALLS,
        stream_s=SILENT_S,
        grpc_port=0,
    ) as found:
        yield found


@pytest.fixture
def channel(gateway: RunningGateway) -> Iterator[Any]:
    with grpc.insecure_channel(gateway.grpc_url, [("grpc.use_local_subchannel_pool", 1)]) as found:
        yield found


def body(size: int) -> bytes:
    """A valid request of this size."""
    tensor = {"name": "X", "shape": [2], "datatype": "FP32", "data": [1.5, -2]}
    text = json.dumps({"inputs": [tensor], "parameters": {"slo_ms": 9000}}).encode()
    return text.replace(b"1.5", b"1.5" + b" " * (size - len(text)))


@pytest.mark.parametrize(("size", "status"), [(JSON_BYTES, 200), (JSON_BYTES + 1, 413)])
@pytest.mark.parametrize("form", ["sized", "chunked", "gzip"])
def test_too_much_json_is_rejected_however_it_is_sent(
    gateway: RunningGateway, form: str, size: int, status: int
) -> None:
    text = body(size)
    sent = post(ANY, text)
    if form == "gzip":
        sent = post(ANY, gzip.compress(text), "Content-Encoding: gzip")
    elif form == "chunked":
        head = post(ANY).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        sent = head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(text), text)
    found = ask(gateway, sent)
    assert found.status == status
    if status == 413:
        assert f"JSON: expected at most {JSON_BYTES} bytes, found {JSON_BYTES + 1}" in found.json["error"]
        assert "JSON: expected at most" in found.json["error"]


def test_binary_tensors_do_not_count_as_json(gateway: RunningGateway) -> None:
    size = 2 * MIB
    tensor = {
        "name": "X", "shape": [size // 4], "datatype": "FP32", "parameters": {"binary_data_size": size},
    }  # fmt: skip
    text = json.dumps({"inputs": [tensor]}).encode()
    sent = post("/v2/models/any/infer", text + bytes(size), f"Inference-Header-Content-Length: {len(text)}")
    assert ask(gateway, sent).status == 200


def test_a_binary_request_with_too_much_json_frees_its_memory(gateway: RunningGateway) -> None:
    text = body(JSON_BYTES + 1)
    found = ask(gateway, post(INFER, text + bytes(8), f"Inference-Header-Content-Length: {len(text)}"))
    assert found.status == 413


@pytest.mark.parametrize("path", [STREAM, f"/{INFERENCE_SERVICE}/ModelInfer"])
def test_a_silent_call_is_ended_with_a_reason(channel: Any, path: str) -> None:
    begun = time.monotonic()
    call = channel.stream_stream(path)(waiting(2 * SILENT_S + 5))
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is Code.DEADLINE_EXCEEDED
    assert "no message was received for 0.4 s (stream_s)" in caught.value.details()
    assert time.monotonic() - begun >= SILENT_S


def test_an_active_stream_is_not_ended(channel: Any) -> None:
    def speaking() -> Iterator[bytes]:
        for _ in range(6):
            time.sleep(SILENT_S / 3)
            yield b""

    assert len(list(channel.stream_stream(STREAM)(speaking()))) == 6


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (0, b"grpc-status\x010"),
        (40, b"grpc-status\x010"),
        (120, b"header: expected at most"),
        (4000, b"grpc-status\x018"),  # the core may refuse so much by itself, in no words
    ],
)
def test_metadata_by_reference_count_each_time(gateway: RunningGateway, times: int, said: bytes) -> None:
    again = hostile_frames.field("x", b"y" * 600, index=True) + b"\xbe" * times
    head = hostile_frames.head(f"/{HEALTH_SERVICE}/Check") + again
    with socket.create_connection(("127.0.0.1", gateway.servers.port_by_name["grpc_port"]), 20) as client:
        ends = hostile_frames.END_HEADERS
        client.sendall(hostile_frames.START + hostile_frames.frame(hostile_frames.HEADERS, ends, 1, head))
        client.sendall(hostile_frames.sent(1, hostile_frames.message(b"")))
        found = b""
        while said not in found:
            part = client.recv(65536)
            assert part, found
            found += part


def test_a_zip_bomb_over_grpc_is_rejected(gateway: RunningGateway) -> None:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(gateway.grpc_url, options) as channel:
        call = channel.unary_unary(f"/{INFERENCE_SERVICE}/ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes(16 * MIB), compression=grpc.Compression.Gzip, timeout=60)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in caught.value.details()


def test_large_metadata_over_grpc_is_rejected(gateway: RunningGateway) -> None:
    with grpc.insecure_channel(gateway.grpc_url) as channel:
        call = channel.unary_unary(f"/{INFERENCE_SERVICE}/ServerLive")
        assert call(b"", metadata=(("a", "b" * 20_000),), timeout=60)
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", metadata=(("a", "b" * 48_000),), timeout=60)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_open_calls_are_limited_and_the_next_one_waits(channel: Any) -> None:
    watch = channel.unary_stream(f"/{HEALTH_SERVICE}/Watch")
    check = channel.unary_unary(f"/{HEALTH_SERVICE}/Check")
    watching = [watch(b"") for _ in range(CALLS)]
    for each in watching:
        next(each)
    with pytest.raises(grpc.RpcError) as caught:
        check(b"", timeout=0.2)
    assert caught.value.code() is Code.DEADLINE_EXCEEDED
    watching[0].cancel()
    assert check(b"", timeout=60)
    watching[1].cancel()


def test_a_watch_without_a_request_is_an_error(channel: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream(f"/{HEALTH_SERVICE}/Watch")(iter([])))
    assert caught.value.code() is Code.UNIMPLEMENTED
    assert caplog.text == ""


def waiting(seconds: float) -> Iterator[bytes]:
    """Sends nothing for this long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.02)
    yield from ()
