"""The blocking client: against a real gateway, and against servers that break off."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

from clockwork_client import (
    Client,
    Denied,
    Disconnected,
    Expired,
    Failed,
    Invalid,
    NotServing,
    Rejected,
    TensorMetadata,
)
from clockwork_serve.messages import Outcome, Reason
from clockwork_serve.units import ms
from tests.client.arrays import ARRAYS
from tests.client.scripted import OK, request, scripted

X = np.array([[1.5, -2.0]], np.float32)


# What a good server answers


@pytest.mark.parametrize("datatype", ARRAYS)
def test_every_datatype_goes_and_comes(client, datatype):
    result = client.infer(f"echo_{datatype}", {"x": ARRAYS[datatype]})

    assert result["y"].dtype == ARRAYS[datatype].dtype
    np.testing.assert_array_equal(result["y"], ARRAYS[datatype])


def test_a_result_says_all_that_the_server_said(gateway, client):
    result = client.infer("ident", {"X": X}, request_id="mine", version="1", outputs=["Y"])

    assert (result.model, result.version, result.id) == ("ident", "1", "mine")
    assert result.request_id == gateway.controller.requests[0].request_id
    assert (result.queue_ms, result.exec_ms, result.expected_ms) == (1, 2, 2.5)
    assert (result.batch_size, result.cold_start) == (1, False)
    assert result.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize("count", [2, 20_000, 900_000])
def test_a_tensor_of_any_size_goes_and_comes(client, count):
    x = np.arange(count, dtype=np.float32).reshape(1, count)

    np.testing.assert_array_equal(client.infer("echo_FP32", {"x": x})["y"], x)


def test_sixteen_bits_as_bf16(client):
    bits = np.array([[0x3F80]], np.uint16)
    result = client.infer("echo_BF16", {"x": bits}, datatypes={"x": "BF16"})

    assert result["y"] == ml_dtypes.bfloat16(1.0)


def test_everything_beside_inference(gateway, client):
    assert client.live()
    assert client.ready()
    assert client.model_ready("ident", "1")
    assert not client.model_ready("ident", "7")
    assert client.metadata().name == "clockwork-serve"
    assert client.model_metadata("ident").inputs == (TensorMetadata("X", "FP32", (-1, 2)),)
    assert [(each.name, each.state) for each in client.models()] == [("ident", "READY")]
    assert client.statistics("ident")[0].inference_stats["success"].count == 1
    assert [each.name for each in client.statistics()] == ["ident"]
    client.load("ident")
    client.unload("ident")

    assert [ask.what for ask in gateway.controller.asks[-2:]] == ["load", "unload"]


def test_a_connection_is_kept(gateway, client):
    for _ in range(5):
        client.infer("ident", {"X": X})

    assert gateway.servers.gateway.connections == 1


def test_threads_share_a_client(gateway, client):
    def one(number):
        x = np.full((1, 2), number, np.float32)
        return client.infer("ident", {"X": x})["Y"][0, 0]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(one, range(200))) == list(range(200))
    assert gateway.servers.gateway.connections <= 8


# Deadlines


def test_the_slo_is_the_deadline_on_the_server(gateway, client):
    client.infer("ident", {"X": X}, slo_ms=20_000)
    (sent,) = gateway.controller.requests

    assert ms(10_000) < sent.deadline_ns - sent.arrival_ns <= ms(20_000)


def test_the_slo_bounds_the_wait_where_the_server_is_silent():
    def read_only(connection):
        while connection.recv(65536):
            pass

    with scripted(read_only) as url, Client(url, grace_s=0.05) as client:
        started = time.monotonic()
        with pytest.raises(Expired, match="no answer"):
            client.infer("m", {"x": X}, slo_ms=100)
        assert 0.14 < time.monotonic() - started < 5


def test_a_client_that_stops_waiting_says_so_and_frees_its_place(gateway, client):
    gateway.controller.on_request = lambda request: None

    with pytest.raises(Expired) as caught:
        client.infer("ident", {"X": X}, slo_ms=20_000, timeout_s=2, request_id="mine")

    assert (caught.value.status, caught.value.request_id) == (0, "mine")
    gateway.until(lambda: gateway.controller.cancels)
    (sent,) = gateway.controller.requests
    gateway.do(lambda: gateway.controller.send(gateway.controller.answer(sent, outcome=Outcome.CANCELLED)))


def test_within_the_grace_the_server_says_itself_that_it_was_late(gateway):
    gateway.controller.on_request = lambda request: None

    with Client(gateway.http_url, grace_s=20) as client, pytest.raises(Expired) as caught:
        client.infer("ident", {"X": X}, slo_ms=2000)

    assert caught.value.status == 504
    (sent,) = gateway.controller.requests
    gateway.do(lambda: gateway.controller.send(gateway.controller.answer(sent, outcome=Outcome.EXPIRED)))


def test_a_place_in_line_is_waited_for_no_longer_than_the_deadline(gateway):
    gateway.controller.on_request = lambda request: None
    with Client(gateway.http_url, connections=1) as client, ThreadPoolExecutor(1) as thread:
        first = thread.submit(client.infer, "ident", {"X": X}, slo_ms=20_000)
        gateway.until(lambda: gateway.controller.requests)
        with pytest.raises(Expired, match="none of 1 connections was free"):
            client.infer("ident", {"X": X}, slo_ms=20)
        (sent,) = gateway.controller.requests
        gateway.do(lambda: gateway.controller.send(gateway.controller.echo(sent)))
        np.testing.assert_array_equal(first.result(60)["Y"], X)


# Other ends


@pytest.mark.parametrize(
    ("outcome", "reason", "kind", "status"),
    [
        (Outcome.REJECTED, Reason.QUEUE_FULL, Rejected, 429),
        (Outcome.REJECTED, Reason.DRAINING, NotServing, 503),
        (Outcome.EXPIRED, Reason.LATE, Expired, 504),
        (Outcome.FAILED, Reason.MODEL_RAISED, Failed, 500),
    ],
)
def test_each_outcome_is_an_exception(gateway, client, outcome, reason, kind, status):
    controller = gateway.controller
    controller.on_request = lambda request: controller.answer(
        request, outcome=outcome, reason=reason, message="so it is", retry_after_ns=ms(12.5)
    )

    with pytest.raises(kind, match=f"{reason}: so it is") as caught:
        client.infer("ident", {"X": X})

    assert (caught.value.status, caught.value.reason) == (status, reason)
    assert caught.value.request_id == controller.requests[0].request_id
    assert caught.value.retry_after_s == 0.0125


@pytest.mark.parametrize(
    ("model", "inputs", "field", "status"),
    [
        ("nope", {"X": X}, "model 'nope'", 404),
        ("ident", {"Z": X}, "input 'Z'", 400),
        ("ident", {"X": X.astype(np.float64)}, "input 'X'", 400),
        ("ident", {"X": np.zeros((1, 3), np.float32)}, "input 'X'", 400),
        ("pair", {"A": np.zeros((1, 16), np.int32)}, "input 'B'", 400),
        ("ident", {}, "input 'X'", 400),
    ],
)
def test_what_does_not_fit_is_named_by_the_server(client, model, inputs, field, status):
    with pytest.raises(Invalid) as caught:
        client.infer(model, inputs)

    assert (caught.value.field, caught.value.status) == (field, status)


def test_what_does_not_fit_a_known_model_is_not_even_sent(gateway, client):
    client.model_metadata("ident")
    for wrong in ({"inputs": {"Z": X}}, {"inputs": {"X": X.astype(np.int8)}}, {"outputs": ["Z"]}):
        client.model_metadata("ident")
        with pytest.raises(Invalid) as caught:
            client.infer("ident", **({"inputs": {"X": X}} | wrong))
        assert caught.value.status == 0
    assert gateway.controller.requests == []


def test_a_model_that_changed_is_asked_the_second_time(gateway, client):
    client.model_metadata("ident")
    statuses = []
    for _ in range(2):
        with pytest.raises(Invalid) as caught:
            client.infer("ident", {"Z": X})
        statuses.append(caught.value.status)

    assert statuses == [0, 400]


@pytest.mark.parametrize(
    "wrong",
    [
        {"inputs": X}, {"parameters": {"slo_ms": 5}}, {"parameters": {"a": [1]}},
        {"version": "one"}, {"version": 1}, {"model": ""}, {"outputs": "Y"}, {"slo_ms": 0}, {"retries": -1},
        {"slo_ms": "5"}, {"retries": "x"}, {"timeout_s": "1"}, {"parameters": {None: 1}},
    ],
)  # fmt: skip
def test_a_wrong_argument_is_found_before_anything_is_sent(gateway, client, wrong):
    with pytest.raises(Invalid) as caught:
        client.infer(**({"model": "ident", "inputs": {"X": X}} | wrong))

    assert caught.value.field == f"parameter '{next(iter(wrong.get('parameters', wrong)))}'"
    assert gateway.controller.requests == []


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"model": "\ud800"}, "parameter 'model'"), ({"request_id": "\ud800"}, ""),
        ({"parameters": {"\udfff": 1}}, ""), ({"outputs": ["\ud800"]}, ""),
        ({"inputs": {"\ud800": X}}, ""), ({"inputs": {"X": np.array(["\ud800"])}}, "input 'X'"),
    ],
)  # fmt: skip
def test_text_that_is_no_unicode_is_found_before_anything_is_sent(gateway, client, wrong, field):
    with pytest.raises(Invalid) as caught:
        client.infer(**({"model": "ident", "inputs": {"X": X}} | wrong))

    assert caught.value.field == field
    assert gateway.controller.requests == []


# Retries


def refusing(gateway, times, wait_ms):
    """Returns when requests came, as they come."""
    controller, came_ns = gateway.controller, []

    def answer(request):
        came_ns.append(time.monotonic_ns())
        if len(controller.requests) > times:
            return controller.echo(request)
        return controller.answer(
            request, outcome=Outcome.REJECTED, reason=Reason.QUEUE_FULL, retry_after_ns=ms(wait_ms)
        )

    controller.on_request = answer
    return came_ns


def test_it_comes_back_when_the_server_said(gateway, client):
    came_ns = refusing(gateway, 2, 40)
    result = client.infer("ident", {"X": X}, slo_ms=20_000, retries=2)

    assert result["Y"].shape == (1, 2)
    assert [later - sooner >= ms(40) for sooner, later in pairwise(came_ns)] == [True] * 2


def test_it_does_not_come_back_uninvited(gateway, client):
    refusing(gateway, 2, 1)
    with pytest.raises(Rejected):
        client.infer("ident", {"X": X})

    assert len(gateway.controller.requests) == 1


def test_it_does_not_wait_longer_than_its_caller(gateway, client):
    refusing(gateway, 9, 60_000)
    started = time.monotonic()
    with pytest.raises(Rejected):
        client.infer("ident", {"X": X}, retries=9, timeout_s=30)

    assert time.monotonic() - started < 20
    assert len(gateway.controller.requests) == 1


# Connections that end


def reply(connection):
    request(connection)
    connection.sendall(OK)


def test_a_connection_that_the_server_closed_meanwhile_is_not_used():
    closed = threading.Event()

    def once(connection):
        reply(connection)
        connection.close()
        closed.set()

    with scripted(once, reply) as url, Client(url) as client:
        assert client.metadata().name == "mock"
        assert closed.wait(60)
        time.sleep(0.05)
        assert client.metadata().name == "mock"


def test_a_request_that_was_sent_is_not_sent_again():
    seen = []

    def break_off(connection):
        seen.append(request(connection))

    with scripted(break_off, reply) as url, Client(url) as client:
        with pytest.raises(Disconnected, match="broke before the answer came"):
            client.metadata()
        assert len(seen) == 1
        assert client.metadata().name == "mock"


def test_an_answer_to_a_body_that_is_not_read_is_heard():
    def refuse(connection):
        connection.recv(1000)
        connection.sendall(b'HTTP/1.1 413 Too Large\r\nContent-Length: 20\r\n\r\n{"error":"too much"}')
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 20):
            pass

    with scripted(refuse) as url, Client(url) as client, pytest.raises(Invalid, match="too much"):
        client.infer("m", {"x": np.zeros(4_000_000, np.float32)})


def test_an_answer_is_heard_though_sending_failed():
    def refuse(connection):
        connection.recv(1000)
        connection.sendall(b'HTTP/1.1 413 Too Large\r\nContent-Length: 20\r\n\r\n{"error":"too much"}')

    with scripted(refuse) as url, Client(url) as client, pytest.raises(Invalid, match="too much"):
        client.infer("m", {"x": np.zeros(16_000_000, np.float32)})


def test_other_bytes_are_no_answer():
    def greet(connection):
        request(connection)
        connection.sendall(b"SSH-2.0-nobody\r\n")

    with scripted(greet) as url, Client(url) as client, pytest.raises(Disconnected, match="HTTP"):
        client.metadata()


def test_other_json_is_no_answer():
    with scripted(reply) as url, Client(url) as client, pytest.raises(Failed, match="protocol"):
        client.infer("m", {"x": X[:, :0]}, timeout_s=5)


def test_nobody_there_is_not_serving():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Client(f"127.0.0.1:{port}") as client:
        with pytest.raises(NotServing, match=r"expected a server at 127\.0\.0\.1") as caught:
            client.metadata()
        assert (caught.value.status, caught.value.reason) == (0, "unreachable")
        assert not client.live()
        assert not client.ready()
        assert not client.model_ready("m")


def test_a_key_is_sent_and_a_refusal_of_it_is_denied():
    seen = []

    def refuse(connection):
        for _ in range(2):
            seen.append(request(connection))
            connection.sendall(b'HTTP/1.1 401 Unauthorized\r\nContent-Length: 16\r\n\r\n{"error":"who?"}')

    with scripted(refuse) as url, Client(url, api_key="secret") as client:
        with pytest.raises(Denied, match="who"):
            client.metadata()
        with pytest.raises(Denied):
            client.live()
        assert "secret" not in repr(client)
    assert all(b"\r\nAuthorization: Bearer secret\r\n" in each for each in seen)


def test_closing_ends_calls_in_other_threads(gateway):
    gateway.controller.on_request = lambda request: None
    client = Client(gateway.http_url)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(client.infer, "ident", {"X": X}, slo_ms=20_000)
        gateway.until(lambda: gateway.controller.requests)
        client.close()
        with pytest.raises(Disconnected):
            waiting.result(60)
    with pytest.raises(RuntimeError, match="closed"):
        client.live()
    gateway.until(lambda: gateway.controller.cancels)
    (sent,) = gateway.controller.requests
    gateway.do(lambda: gateway.controller.send(gateway.controller.answer(sent, outcome=Outcome.CANCELLED)))
