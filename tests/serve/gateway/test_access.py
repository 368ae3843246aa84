"""API keys over HTTP and gRPC: who is admitted, and as which tenant. Real sockets, stock clients."""

from __future__ import annotations

import gc
import queue
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from clockwork_serve.messages import Question
from clockwork_serve.oip import http_description
from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, rpcs
from clockwork_serve.serve.gateway.access import Right
from clockwork_serve.serve.grpc.service import right_of as right_of_rpc
from clockwork_serve.serve.http.exchange import right_of
from clockwork_serve.serve.http.routes import find_route
from tests.serve.gateway.keys import entry, written
from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.serve.http.requests import IDENT_JSON, INFER, Found, X, ask, get, post, tensor

pytestmark = pytest.mark.filterwarnings("ignore:.*InferenceServerClient.__del__")

ALPHA, OMEGA, SCRAPE = ("x-api-key: alpha",), ("Authorization: Bearer omega",), ("x-api-key: scrape",)
LOAD = "/v2/repository/models/ident/load"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    path = written(
        folder,
        entry("team-a", "alpha", "infer"),
        entry("ops", "omega", "admin", "infer"),
        entry("prometheus", "scrape", "metrics"),
    )
    with running_gateway(folder, grpc_port=0, metrics_port=0, api_keys=path) as found:
        yield found
    gc.collect()  # what stock clients left, in their own thread


@pytest.fixture
def gateway(shared: RunningGateway) -> RunningGateway:
    shared.controller.asks.clear()
    return shared


@pytest.mark.parametrize(
    ("method", "path", "right"),
    [
        ("GET", "/v2/health/live", None),
        ("GET", "/v2/health/ready", None),
        ("GET", "/v2/models/m/ready", None),
        ("GET", "/v2/models/m/versions/1/ready", None),
        ("POST", "/v2/models/m/infer", Right.INFER),
        ("POST", "/v2/models/m/versions/1/infer", Right.INFER),
        ("GET", "/v2", Right.INFER),
        ("GET", "/v2/models", Right.INFER),
        ("GET", "/v2/models/m", Right.INFER),
        ("GET", "/v2/models/m/config", Right.INFER),
        ("GET", "/v2/openapi.json", Right.INFER),
        ("GET", "/v2/models/m/stats", Right.INFER),
        ("HEAD", "/v2/models/stats", Right.INFER),
        ("POST", "/v2/repository/index", Right.INFER),
        ("GET", "/v2/trace/setting", Right.INFER),
        ("GET", "/v2/logging", Right.INFER),
        ("POST", "/v2/models/m/generate", Right.INFER),
        ("GET", "/nothing", Right.INFER),
        ("GET", "/metrics", Right.METRICS),
        ("POST", "/v2/repository/models/m/load", Right.ADMIN),
        ("POST", "/v2/repository/models/m/unload", Right.ADMIN),
        ("POST", "/v2/systemsharedmemory/region/r/register", Right.ADMIN),
        ("POST", "/v2/systemsharedmemory/region/r/unregister", Right.ADMIN),
        ("POST", "/v2/cudasharedmemory/unregister", Right.ADMIN),
        ("GET", "/v2/systemsharedmemory/status", Right.INFER),
        ("POST", "/v2/trace/setting", Right.ADMIN),
        ("POST", "/v2/logging", Right.ADMIN),
        ("DELETE", "/v2/models/m", Right.ADMIN),
    ],
)
def test_which_right_a_path_needs(method: str, path: str, right: Right | None) -> None:
    assert right_of(method.encode(), find_route(path.encode())) == right


def test_which_right_an_rpc_needs() -> None:
    found: dict[Right | None, list[str]] = {}
    for name in rpcs(INFERENCE_SERVICE):
        found.setdefault(right_of_rpc(f"/{INFERENCE_SERVICE}/{name}"), []).append(name)
    assert sorted(found.pop(None)) == ["ModelReady", "ServerLive", "ServerReady"]
    assert sorted(found.pop(Right.INFER)) == [
        "CudaSharedMemoryStatus", "ModelConfig", "ModelInfer", "ModelMetadata", "ModelStatistics",
        "ModelStreamInfer", "RepositoryIndex", "ServerMetadata", "SystemSharedMemoryStatus",
    ]  # fmt: skip
    # Whatever else there is or will be.
    assert set(found) == {Right.ADMIN}
    assert right_of_rpc("/some.Other/Service") is Right.ADMIN
    assert right_of_rpc("/grpc.health.v1.Health/Watch") is None


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (get("/v2/health/live"), 200),
        (get("/v2/models/ident/ready"), 200),
        (get("/v2"), 401),
        (get("/nothing"), 401),
        (get("/v2", "x-api-key: guess"), 401),
        (get("/v2", "Authorization: Basic alpha"), 401),
        (get("/v2", *ALPHA), 200),
        (get("/v2", "X-API-KEY: alpha"), 200),
        (get("/nothing", *ALPHA), 404),
        (post(INFER, IDENT_JSON), 401),
        (post(INFER, IDENT_JSON, *ALPHA), 200),
        (post(INFER, IDENT_JSON, *OMEGA), 200),
        (post(INFER, IDENT_JSON, *SCRAPE), 403),
        (post(LOAD, b"{}"), 401),
        (post(LOAD, b"{}", *ALPHA), 403),
        (post(LOAD, b"{}", *OMEGA), 200),
        (get("/metrics"), 401),
        (get("/metrics", *ALPHA), 403),
        (get("/metrics", *SCRAPE), 200),
        (get("/v2", method="HEAD"), 401),
    ],
)
def test_valid_keys_over_http(gateway: RunningGateway, sent: bytes, status: int) -> None:
    found = ask(gateway, sent)
    assert found.status == status
    assert (found.headers.get("www-authenticate") == "Bearer") is (status == 401)
    loaded = [asked for asked in gateway.controller.asks if asked.what == Question.LOAD]
    assert len(loaded) == (sent.startswith(b"POST /v2/repository") and status == 200)


def test_exactly_the_endpoints_described_as_needing_a_key_need_one(gateway: RunningGateway) -> None:
    for path, item in http_description("1")["paths"].items():
        asked = path.format(model="ident", version="1", region="r")
        for method in item.keys() & {"get", "post"}:
            found = ask(gateway, get(asked) if method == "get" else post(asked))
            needs = item[method].get("security") != [{}]
            assert (found.status == 401) is needs, (method, path, found.status)
            assert str(found.status) in item[method]["responses"]


def test_the_metrics_port_needs_a_key_too(gateway: RunningGateway) -> None:
    port = gateway.servers.port_by_name["metrics_port"]
    for headers, status in (((), 401), (ALPHA, 403), (SCRAPE, 200)):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(get("/metrics", *headers))
            assert Found(client.makefile("rb").read()).status == status


def test_access_is_denied_before_the_body_is_read(gateway: RunningGateway) -> None:
    with gateway.connect() as client:
        head = post(INFER, b"", "Expect: 100-continue", close=False).replace(b"th: 0", b"th: 5000000")
        client.sendall(head)
        assert client.recv(1000).startswith(b"HTTP/1.1 401")


def test_each_request_of_a_connection_is_checked(gateway: RunningGateway) -> None:
    first = post(INFER, IDENT_JSON, *ALPHA, close=False)
    found = gateway.exchange(first + first + post(INFER, IDENT_JSON, close=False) + first)
    assert [part[:3] for part in found.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"401"]


def test_a_key_in_a_trailer_is_ignored(gateway: RunningGateway) -> None:
    sent = (
        f"POST {INFER} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nx-api-key: alpha\r\n\r\n"
    ).encode()
    assert ask(gateway, sent).status == 401


@pytest.mark.parametrize(
    "headers",
    [
        ("Authorization: Bearer alpha", "Authorization: Bearer omega"),
        ("Authorization: Bearer omega", "authorization: Bearer omega"),
        ("x-api-key: alpha", "X-Api-Key: omega"),
        (*OMEGA, "x-slo-ms: 1", "x-slo-ms: 1000"),
        (*OMEGA, "Origin: http://a", "Origin: http://b"),
    ],
)
def test_a_header_of_which_one_is_expected_may_not_come_twice(
    gateway: RunningGateway, headers: tuple[str, ...]
) -> None:
    found = ask(gateway, post(INFER, IDENT_JSON, *headers))
    assert (found.status, "more often" in found.json["error"]) == (400, True)
    assert not gateway.controller.asks


def test_metadata_of_which_one_is_expected_may_not_come_twice(gateway: RunningGateway) -> None:
    with (
        grpc.insecure_channel(gateway.grpc_url) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.unary_unary(f"/{INFERENCE_SERVICE}/RepositoryModelUnload")(
            b"", metadata=(("authorization", "Bearer alpha"), ("authorization", "Bearer omega")), timeout=60
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_stock_clients_send_keys_as_headers(gateway: RunningGateway) -> None:
    with closing(tritonclient.http.InferenceServerClient(gateway.http_url)) as client:
        headers = {"Authorization": "Bearer alpha"}
        found = client.infer("ident", [tensor("X", X, "FP32")], headers=headers)
        np.testing.assert_array_equal(found.as_numpy("Y"), X)
        with pytest.raises(InferenceServerException, match="401"):
            client.infer("ident", [tensor("X", X, "FP32")])
        with pytest.raises(InferenceServerException, match="403"):
            client.load_model("ident", headers=headers)
        assert client.is_server_ready()


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[Any]:
    found = tritonclient.grpc.InferenceServerClient(gateway.grpc_url)
    yield found
    found.close()


def grpc_tensor() -> Any:
    found = tritonclient.grpc.InferInput("X", [1, 2], "FP32")
    found.set_data_from_numpy(X)
    return found


@pytest.mark.parametrize("headers", [{"authorization": "Bearer alpha"}, {"x-api-key": "alpha"}])
def test_valid_keys_over_grpc(client: Any, headers: dict[str, str]) -> None:
    np.testing.assert_array_equal(client.infer("ident", [grpc_tensor()], headers=headers).as_numpy("Y"), X)
    assert client.get_server_metadata(headers=headers).name == "clockwork-serve"
    with pytest.raises(InferenceServerException, match="'admin'") as caught:
        client.load_model("ident", headers=headers)
    assert caught.value.status() == "StatusCode.PERMISSION_DENIED"
    client.load_model("ident", headers={"x-api-key": "omega"})


@pytest.mark.parametrize("headers", [None, {"x-api-key": "guess"}, {"authorization": "Bearer"}])
def test_invalid_keys_over_grpc(client: Any, headers: dict[str, str] | None) -> None:
    for asked in (
        lambda: client.infer("ident", [grpc_tensor()], headers=headers),
        lambda: client.get_model_metadata("ident", headers=headers),
        lambda: client.load_model("ident", headers=headers),
    ):
        with pytest.raises(InferenceServerException, match="API key: expected") as caught:
            asked()
        assert caught.value.status() == "StatusCode.UNAUTHENTICATED"
    assert client.is_server_live()
    assert client.is_model_ready("ident")


def test_a_stream_without_a_key_ends_before_its_first_message(gateway: RunningGateway) -> None:
    stream = rpcs(INFERENCE_SERVICE)["ModelStreamInfer"]
    with grpc.insecure_channel(gateway.grpc_url) as channel:
        call = channel.stream_stream(
            f"/{INFERENCE_SERVICE}/ModelStreamInfer", stream.request.SerializeToString,
            stream.response.FromString,
        )  # fmt: skip
        nothing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with pytest.raises(grpc.RpcError) as caught:
            next(call(iter(nothing.get, None), timeout=60))
        nothing.put(None)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_request_has_its_key_s_tenant(gateway: RunningGateway, client: Any) -> None:
    seen: list[str] = []
    plain = gateway.servers.gateway.infer

    def infer(exchange: Any) -> str:
        seen.append(exchange.identity)
        return plain(exchange)

    gateway.servers.gateway.infer = infer
    try:
        ask(gateway, post(INFER, IDENT_JSON, *ALPHA))
        client.infer("ident", [grpc_tensor()], headers={"x-api-key": "omega"})
        ask(gateway, post(INFER, IDENT_JSON, *OMEGA))
        client.infer("ident", [grpc_tensor()], headers={"x-api-key": "alpha"})
    finally:
        del gateway.servers.gateway.infer
    assert seen == ["team-a", "ops", "ops", "team-a"]


def test_a_removed_key_is_denied_soon(tmp_path: Path) -> None:
    path = written(tmp_path, entry("a", "old", "infer"))
    with running_gateway(tmp_path, api_keys=path) as found:
        assert ask(found, get("/v2", "x-api-key: old")).status == 200
        (tmp_path / "new").mkdir()
        new = written(tmp_path / "new", entry("a", "new", "infer"))
        Path(new).replace(path)
        end = time.monotonic() + 20
        while ask(found, get("/v2", "x-api-key: old")).status != 401:
            assert time.monotonic() < end
        assert ask(found, get("/v2", "x-api-key: new")).status == 200
