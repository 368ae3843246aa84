"""Shared memory with stock clients, over HTTP and gRPC, against one gateway."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from clockwork_serve.messages import Answer, Outcome, Request
from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, rpcs
from clockwork_serve.serve.grpc.call import Aborted
from clockwork_serve.serve.grpc.service import _local
from clockwork_serve.serve.http.connection import HttpConnection
from clockwork_serve.serve.http.exchange import HttpExchange
from clockwork_serve.serve.http.routes import find_route
from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.serve.http.requests import ask, get, post
from tests.serve.segments import PREFIX, Segment, segment

# The stock client's destructor stumbles when the collector happens to run it in another thread.
pytestmark = pytest.mark.filterwarnings("ignore:.*InferenceServerClient.__del__")

X = np.array([[1.5, -2]], np.float32)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), grpc_port=0, shared_memory=PREFIX) as found:
        yield found
    gc.collect()  # what stock clients left, in their own thread


@pytest.fixture
def gateway(running: RunningGateway) -> Iterator[RunningGateway]:
    controller = running.controller
    controller.on_request = controller.echo
    controller.requests.clear()
    yield running
    running.servers.gateway.regions.unregister()
    running.until(lambda: running.servers.gateway.slots.used_bytes == 0)
    running.servers.gateway.slots.region.check()


@pytest.fixture(params=["http", "grpc"])
def kind(request: pytest.FixtureRequest) -> Any:
    return {"http": tritonclient.http, "grpc": tritonclient.grpc}[request.param]


@pytest.fixture
def client(gateway: RunningGateway, kind: Any) -> Iterator[Any]:
    url = gateway.http_url if kind is tritonclient.http else gateway.grpc_url
    with kind.InferenceServerClient(url) as found:
        yield found


@pytest.fixture
def shared() -> Iterator[Segment]:
    with segment(4096, X.tobytes()) as found:
        yield found


def x_in(kind: Any, nbytes: int = 8, offset: int = 0, name: str = "r", **shape: Any) -> Any:
    found = kind.InferInput(shape.get("of", "X"), shape.get("shape", [1, 2]), shape.get("datatype", "FP32"))
    found.set_shared_memory(name, nbytes, offset)
    return found


def y_out(kind: Any, nbytes: int = 8, offset: int = 64, output: str = "Y", name: str = "r") -> Any:
    found = kind.InferRequestedOutput(output)
    found.set_shared_memory(name, nbytes, offset)
    return found


def check_told(kind: Any, result: Any, nbytes: int) -> None:
    """The first output has no data; over gRPC it says what was written."""
    response = result.get_response()
    if kind is tritonclient.http:
        assert response["outputs"][0].keys() == {"name", "datatype", "shape"}
        return
    assert response.raw_output_contents[0] == b""
    parameters = response.outputs[0].parameters
    assert parameters["shared_memory_region"].string_param == "r"
    assert parameters["shared_memory_byte_size"].int64_param == nbytes


def test_register_infer_status_unregister(
    gateway: RunningGateway, client: Any, kind: Any, shared: Segment
) -> None:
    client.unregister_system_shared_memory()
    client.register_system_shared_memory("r", shared.key, 4000, 96)
    shared.write(X.tobytes(), 96)
    result = client.infer("ident", [x_in(kind)], outputs=[y_out(kind)])

    assert shared.read(8, 96 + 64) == X.tobytes()
    check_told(kind, result, 8)
    assert gateway.controller.inputs(gateway.controller.requests[0]) == {"X": X.tobytes()}
    status = client.get_system_shared_memory_status("r")
    if kind is tritonclient.http:
        assert status == [{"name": "r", "key": shared.key, "offset": 96, "byte_size": 4000}]
    else:
        found = status.regions["r"]
        assert (found.name, found.key, found.offset, found.byte_size) == ("r", shared.key, 96, 4000)
    client.unregister_system_shared_memory("r")
    client.unregister_system_shared_memory("r")
    every = client.get_system_shared_memory_status()
    assert not (every if kind is tritonclient.http else every.regions)
    with pytest.raises(
        InferenceServerException, match=r"(404|NOT_FOUND).*Unable to find shared memory region: 'r'"
    ):
        client.infer("ident", [x_in(kind)])


def test_shared_and_sent_tensors_may_be_mixed(client: Any, kind: Any, shared: Segment) -> None:
    client.register_system_shared_memory("r", shared.key, 4096)
    numbers = np.arange(32, dtype=np.int32).reshape(2, 16)
    shared.write(numbers.tobytes(), 128)
    sent = kind.InferInput("A", [2, 16], "INT32")
    sent.set_data_from_numpy(-numbers)
    there = x_in(kind, 128, 128, of="B", shape=[2, 16], datatype="INT32")
    result = client.infer(
        "pair", [sent, there], outputs=[y_out(kind, 200, 512, "C"), kind.InferRequestedOutput("D")]
    )

    assert shared.read(128, 512) == (-numbers).tobytes()
    np.testing.assert_array_equal(result.as_numpy("D"), numbers)
    check_told(kind, result, 128)


def test_strings_and_half_floats_go_through_shared_memory(client: Any, kind: Any, shared: Segment) -> None:
    client.register_system_shared_memory("r", shared.key, 4096)
    for model, datatype, content in (
        ("text", "BYTES", b"\2\0\0\0hi\0\0\0\0"),
        ("half", "FP16", np.array([1, 0.5], np.float16).tobytes()),
    ):
        shared.write(content)
        there = x_in(kind, len(content), datatype=datatype)
        result = client.infer(model, [there], outputs=[y_out(kind, 100)])
        assert shared.read(len(content), 64) == content
        check_told(kind, result, len(content))


def test_large_tensors_go_through_shared_memory(gateway: RunningGateway, client: Any, kind: Any) -> None:
    numbers = np.arange(1 << 20, dtype=np.float32)
    with segment(8 << 20, numbers.tobytes()) as large:
        client.register_system_shared_memory("r", large.key, 8 << 20)
        there = x_in(kind, numbers.nbytes, shape=[numbers.size])
        client.infer("any", [there], outputs=[y_out(kind, numbers.nbytes, 4 << 20)])
        assert large.read(numbers.nbytes, 4 << 20) == numbers.tobytes()


@pytest.mark.parametrize(
    ("nbytes", "offset", "words"),
    [
        (8, 4096, r"(400|INVALID_ARGUMENT).*Invalid offset for shared memory region: 'r'"),
        (8, 4089, r"(400|INVALID_ARGUMENT).*Invalid offset \+ byte size for shared memory region: 'r'"),
        (16, 0, r"(400|INVALID_ARGUMENT).*expected 8 bytes for shape \[1, 2\] of FP32, found 16"),
        (0, 0, r"(400|INVALID_ARGUMENT).*expected 8 bytes for shape \[1, 2\] of FP32, found 0"),
    ],
)
def test_inputs_outside_their_region_never_reach_a_device(
    gateway: RunningGateway, client: Any, kind: Any, shared: Segment, nbytes: int, offset: int, words: str
) -> None:
    client.register_system_shared_memory("r", shared.key, 4096)
    with pytest.raises(InferenceServerException, match=words):
        client.infer("ident", [x_in(kind, nbytes, offset)])
    assert gateway.controller.requests == []


def test_outputs_that_do_not_fit_are_rejected_before_the_model_runs(
    gateway: RunningGateway, client: Any, kind: Any, shared: Segment
) -> None:
    client.register_system_shared_memory("r", shared.key, 4096)
    for wish, words in (
        (y_out(kind, 7), r"for output 'Y' \(7 bytes\) should be at least 8 bytes"),
        (y_out(kind, 8, 4090), "Invalid offset . byte size"),
        (y_out(kind, name="s"), "Unable to find shared memory region: 's'"),
    ):
        with pytest.raises(InferenceServerException, match=words):
            client.infer("ident", [x_in(kind)], outputs=[wish])
    assert gateway.controller.requests == []


def test_an_output_of_dynamic_size_that_does_not_fit_is_an_error(
    client: Any, kind: Any, shared: Segment
) -> None:
    client.register_system_shared_memory("r", shared.key, 4096)
    there = x_in(kind, 40, shape=[10])
    with pytest.raises(InferenceServerException, match=r"\(39 bytes\) should be at least 40 bytes"):
        client.infer("any", [there], outputs=[y_out(kind, 39)])
    assert shared.read(40, 64) == bytes(40)


def test_a_region_that_changes_while_the_model_runs_is_an_error(
    gateway: RunningGateway, client: Any, kind: Any, shared: Segment
) -> None:
    controller = gateway.controller

    def while_running(change: Any) -> Any:
        def on_request(request: Request) -> Answer:
            change()
            return controller.echo(request)

        return on_request

    for change, words in (
        (lambda: shared.resize(66), "expected at least 72 bytes .* found 66"),
        (gateway.servers.gateway.regions.unregister, "Unable to find shared memory region: 'r'"),
    ):
        shared.resize(4096)
        client.unregister_system_shared_memory()
        client.register_system_shared_memory("r", shared.key, 4096)
        controller.on_request = while_running(change)
        with pytest.raises(InferenceServerException, match=words):
            client.infer("ident", [x_in(kind)], outputs=[y_out(kind)])


def test_a_rejected_request_writes_nothing(
    gateway: RunningGateway, client: Any, kind: Any, shared: Segment
) -> None:
    client.register_system_shared_memory("r", shared.key, 4096)
    gateway.controller.on_request = lambda request: gateway.controller.answer(
        request, outcome=Outcome.EXPIRED
    )
    with pytest.raises(InferenceServerException, match=r"504|DEADLINE_EXCEEDED"):
        client.infer("ident", [x_in(kind)], outputs=[y_out(kind)])
    assert shared.read(8, 64) == bytes(8)


def test_integers_may_be_written_as_floats(gateway: RunningGateway, shared: Segment) -> None:
    def registered(size: str) -> int:
        body = b'{"key":"%s","byte_size":%s,"offset":0.0}' % (shared.key.encode(), size.encode())
        return ask(gateway, post("/v2/systemsharedmemory/region/r/register", body)).status

    assert [registered(size) for size in ("64.5", "64.0")] == [400, 200]
    found = ask(gateway, get("/v2/systemsharedmemory/region/r/status")).json
    assert found == [{"name": "r", "key": shared.key, "offset": 0, "byte_size": 64}]


def test_invalid_registrations_get_an_explanation(client: Any, kind: Any, shared: Segment) -> None:
    client.register_system_shared_memory("r", shared.key, 4096)
    for name, key, byte_size, words in (
        ("r", shared.key, 8, "(409|ALREADY_EXISTS).*shared memory region 'r' already in manager"),
        ("s", shared.key, 4097, "(400|INVALID_ARGUMENT).*'s': invalid args"),
        ("s", shared.key, 0, "(400|INVALID_ARGUMENT).*byte_size: expected at least 1"),
        ("s", "/other", 8, f"(403|PERMISSION_DENIED).*begins with '{PREFIX}'"),
        ("s", f"{PREFIX}/../x", 8, "(400|INVALID_ARGUMENT).*without a slash but the first"),
        (
            "s",
            f"{PREFIX}none",
            8,
            "(400|INVALID_ARGUMENT).*Unable to open shared memory region.*No such file",
        ),
    ):
        with pytest.raises(InferenceServerException, match=words):
            client.register_system_shared_memory(name, key, byte_size)
    with pytest.raises(InferenceServerException, match="Unable to find system shared memory region: 's'"):
        client.get_system_shared_memory_status("s")


def test_the_server_s_metadata_lists_the_extension(client: Any, kind: Any) -> None:
    metadata = client.get_server_metadata()
    extensions = metadata["extensions"] if kind is tritonclient.http else metadata.extensions
    assert "system_shared_memory" in extensions
    assert "cuda_shared_memory" not in extensions


def test_there_is_no_cuda_shared_memory_and_none_can_be_registered(client: Any, kind: Any) -> None:
    found = client.get_cuda_shared_memory_status()
    assert (found if kind is tritonclient.http else list(found.regions)) == []
    client.unregister_cuda_shared_memory()
    client.unregister_cuda_shared_memory("c")
    with pytest.raises(InferenceServerException, match=r"(404|NOT_FOUND).*cuda shared memory region: 'c'"):
        client.get_cuda_shared_memory_status("c")
    with pytest.raises(InferenceServerException, match=r"(501|UNIMPLEMENTED).*CUDA shared memory is not"):
        client.register_cuda_shared_memory("c", b"aGFuZGxl", 0, 8)


@pytest.mark.parametrize("given", ["http", "grpc"])
def test_it_is_off_by_default(tmp_path: Any, given: str, shared: Segment) -> None:
    kind = {"http": tritonclient.http, "grpc": tritonclient.grpc}[given]
    with running_gateway(tmp_path, grpc_port=0) as off:
        with kind.InferenceServerClient(off.http_url if given == "http" else off.grpc_url) as client:
            for asked in (
                client.get_system_shared_memory_status,
                client.unregister_system_shared_memory,
                lambda: client.register_system_shared_memory("r", shared.key, 8),
                lambda: client.infer("ident", [x_in(kind)]),
            ):
                with pytest.raises(InferenceServerException, match=r"(501|UNIMPLEMENTED).*--shared-memory"):
                    asked()
            metadata = client.get_server_metadata()
            assert "system_shared_memory" not in str(metadata)
        assert off.controller.requests == []


# Clients of other hosts


class Transport:
    """The parts of a connection that tell the peer's address."""

    def __init__(self, host: str) -> None:
        self.peername = (host, 40000)

    def get_extra_info(self, name: str) -> Any:
        return getattr(self, name, None)


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("10.1.2.3", False), ("::1", True)])
def test_http_knows_where_a_client_is(gateway: RunningGateway, host: str, local: bool) -> None:
    def connected() -> bool:
        connection = HttpConnection(gateway.servers.http)
        connection.connection_made(Transport(host))
        connection.connection_lost(None)
        return connection._local

    assert gateway.do(connected) is local


@pytest.mark.parametrize(
    ("peer", "local"),
    [("ipv4:127.0.0.1:40000", True), ("ipv6:%5B::1%5D:40000", True), ("ipv6:[::1]:40000", True),
     ("ipv4:10.1.2.3:40000", False), ("ipv6:%5B2001:db8::1%5D:40000", False), ("unix:", False)],
)  # fmt: skip
def test_grpc_knows_where_a_client_is(peer: str, local: bool) -> None:
    class Context:
        def peer(self) -> str:
            return peer

    assert _local(Context()) is local


def test_clients_of_other_hosts_are_refused_over_http(gateway: RunningGateway, shared: Segment) -> None:
    register = b'{"key":"%s","byte_size":8}' % shared.key.encode()
    there = b'{"name":"X","shape":[1,2],"datatype":"FP32","parameters":%s}' % (
        b'{"shared_memory_region":"r","shared_memory_byte_size":8}'
    )
    for method, path, body in (
        (b"GET", b"/v2/systemsharedmemory/status", b""),
        (b"POST", b"/v2/systemsharedmemory/unregister", b""),
        (b"POST", b"/v2/systemsharedmemory/region/r/register", register),
        (b"POST", b"/v2/models/ident/infer", b'{"inputs":[%s]}' % there),
    ):
        exchange = HttpExchange(lambda: None, method, find_route(path))
        exchange.content = memoryview(body)
        gateway.do(partial(gateway.servers.http.dispatch, exchange))
        assert exchange.response is not None
        assert exchange.response.status == 403
        assert b"loopback" in exchange.response.parts[0]
    assert gateway.controller.requests == []


class FarCall:
    """A call from another host."""

    identity = ""
    arrival_ns = 1
    is_open = True

    def peer(self) -> str:
        return "ipv4:10.1.2.3:40000"

    def metadatum(self, key: str) -> None:
        return None

    def time_allowed(self, now_ns: int) -> None:
        return None

    def fail(self, code: grpc.StatusCode, text: str, trailers: Any = ()) -> None:
        raise Aborted(code, text, trailers)


def test_clients_of_other_hosts_are_refused_over_grpc(gateway: RunningGateway, shared: Segment) -> None:
    servicer = gateway.servers.grpc
    answers = servicer._inference()
    register = {"name": "r", "key": shared.key, "byte_size": 8}
    known = rpcs(INFERENCE_SERVICE)
    for name, fields in (
        ("SystemSharedMemoryStatus", {}),
        ("SystemSharedMemoryUnregister", {}),
        ("SystemSharedMemoryRegister", register),
    ):
        with pytest.raises(Aborted, match="loopback") as caught:
            gateway.run(answers[name](known[name].request(**fields), FarCall()))
        assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED
    infer = known["ModelInfer"].request(
        model_name="ident", inputs=[{"name": "X", "shape": [1, 2], "datatype": "FP32"}]
    )
    infer.inputs[0].parameters["shared_memory_region"].string_param = "r"
    infer.inputs[0].parameters["shared_memory_byte_size"].int64_param = 8
    with pytest.raises(Aborted, match="loopback") as caught:
        gateway.do(lambda: servicer._infer(FarCall(), infer))
    assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED
    assert gateway.controller.requests == []


def test_methods_and_paths_matter(gateway: RunningGateway) -> None:
    assert ask(gateway, post("/v2/systemsharedmemory/status")).status == 405
    assert ask(gateway, get("/v2/systemsharedmemory/region/r/register")).status == 405
    assert ask(gateway, get("/v2/systemsharedmemory/region/r/other")).status == 404
    assert ask(gateway, post("/v2/systemsharedmemory/region//register", b"{}")).status == 404
    assert ask(gateway, post("/v2/systemsharedmemory/register", b"{}")).status == 404
    assert ask(gateway, post("/v2/systemsharedmemory/region/r/register", b"[]")).status == 400
    found = ask(gateway, post("/v2/systemsharedmemory/region/r/unregister"))
    assert (found.status, found.json) == (200, {})
