"""Without API keys: another site's page, asking through a browser, changes nothing. On real sockets."""

from __future__ import annotations

import gc
import logging
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
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
from tests.serve.certificates import certificates
from tests.serve.gateway.keys import entry, written
from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.serve.http.requests import IDENT_JSON, INFER, Found, ask, get, post

pytestmark = pytest.mark.filterwarnings("ignore:.*InferenceServerClient.__del__")

LOAD = "/v2/repository/models/ident/load"
TRUSTED = ("models.example.com", "ui.example.com")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with running_gateway(folder, grpc_port=0, trusted_hosts=TRUSTED, shared_memory="/clockwork-") as found:
        yield found
    gc.collect()  # what stock clients left, in their own thread


@pytest.fixture
def gateway(shared: RunningGateway) -> RunningGateway:
    shared.controller.asks.clear()
    return shared


def loads(gateway: RunningGateway) -> int:
    return sum(asked.what == Question.LOAD for asked in gateway.controller.asks)


def request(path: str, host: str | None, *headers: str, body: bytes = b"{}") -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Content-Length: {len(body)}", "Connection: close", *headers]
    if host is not None:
        lines.insert(1, f"Host: {host}")
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8000", None),
        ("[::1]:8000", None),
        ("[fe80::1%25eth0]:8000", None),
        ("10.0.0.7", None),  # of this machine, a container, or of what forwards to it
        ("localhost:8000", None),
        ("LocalHost.", None),
        ("models.localhost", None),
        ("clockwork-http:8000", None),  # a Service, or a container's name
        ("clockwork-http.prod.svc.cluster.local:8000", None),
        ("box.internal", None),
        (f"{socket.gethostname()}:8000", None),
        ("models.example.com", None),  # as a load balancer passes it on
        ("MODELS.example.com:443", None),
        (None, None),  # HTTP/1.0, or a probe by hand
        ("localhost:8000", "http://localhost:8000"),
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("models.example.com", "https://models.example.com"),
        ("10.0.0.7:8000", "https://ui.example.com:8443"),
    ],
)
def test_requests_of_programs_and_of_this_server_s_own_pages_are_answered(
    gateway: RunningGateway, host: str | None, origin: str | None
) -> None:
    found = ask(gateway, request(LOAD, host, *(() if origin is None else (f"Origin: {origin}",))))
    assert (found.status, loads(gateway)) == (200, 1)


FOREIGN_HOSTS = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "[::1",
    "",
]
FOREIGN_ORIGINS = [
    "http://evil.example", "https://evil.example:8000", "null", "file://", "http://localhost:3000",
    "http://127.0.0.1.evil.example:8000", "http://localhost:8000.evil.example", "http://[::1", "nonsense",
    "http://10.0.0.66:8000", "http://localhost:x",
]  # fmt: skip


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
@pytest.mark.parametrize("own_origin", [False, True])
def test_another_name_for_this_server_changes_nothing(
    gateway: RunningGateway, host: str, own_origin: bool
) -> None:
    # DNS rebinding: to the browser, the page's site and this server are the same.
    found = ask(gateway, request(LOAD, host, *([f"Origin: http://{host}"] if own_origin else [])))
    assert (found.status, loads(gateway)) == (403, 0)
    for part in ("header 'Host': expected", f"found '{host}'", "trusted_hosts", "api_keys"):
        assert part in found.json["error"]


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_a_page_of_another_site_changes_nothing(gateway: RunningGateway, origin: str) -> None:
    found = ask(gateway, request(LOAD, "localhost:8000", f"Origin: {origin}", "Content-Type: text/plain"))
    assert (found.status, loads(gateway)) == (403, 0)
    for part in ("header 'Origin': expected", f"found '{origin}'", "trusted_hosts", "api_keys"):
        assert part in found.json["error"]


NAMED = """
from clockwork_serve.config import Settings
from clockwork_serve.serve.gateway.access import AccessDenied, Sites

sites = Sites(Settings())

def told(name):
    try:
        sites.check(name, None)
    except AccessDenied:
        return False
    return True

print(told(b"box.corp.example:8000"), told(b"other.corp.example:8000"))
"""


def test_this_machine_s_whole_name_in_the_file_of_hosts_is_its_own(tmp_path: Path) -> None:
    # In a name space where the machine is called so.
    hosts = tmp_path / "hosts"
    hosts.write_text(
        "127.0.0.1 localhost\n127.0.1.1 Box.corp.example box # us\n::2 other.corp.example other\n"
    )
    script = 'hostname box && mount --bind "$1" /etc/hosts || exit 99; shift; exec "$@"'
    begin = ["unshare", "--map-root-user", "--mount", "--uts", "sh", "-c", script, "sh", str(hosts)]
    if shutil.which("unshare") is None or subprocess.run([*begin, "true"], check=False).returncode:
        pytest.skip("needs name spaces")
    command = [*begin, sys.executable, "-c", NAMED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True False\n"


def test_every_endpoint_that_changes_something_is_guarded_and_no_other(gateway: RunningGateway) -> None:
    guarded = set()
    for path, item in http_description("1")["paths"].items():
        asked = path.format(model="ident", version="1", region="r")
        for method in (each.upper() for each in item.keys() & {"get", "post"}):
            right = right_of(method.encode(), find_route(asked.encode()))
            for header in ("Host: evil.example", "Origin: http://evil.example"):
                sent = (get(asked) if method == "GET" else post(asked)).replace(
                    b"Host: here", header.encode()
                )
                assert (ask(gateway, sent).status == 403) is (right is Right.ADMIN), (method, path, header)
            if right is Right.ADMIN:
                guarded.add(path.rpartition("/")[2])
    assert guarded >= {"load", "unload", "register", "unregister"}


def test_inference_and_probes_ask_nobody_whose_they_are(gateway: RunningGateway) -> None:
    assert ask(gateway, request(INFER, "evil.example", body=IDENT_JSON)).status == 200
    assert ask(gateway, get("/v2/health/ready").replace(b"here", b"evil.example")).status == 200


def test_each_request_of_a_connection_is_checked(gateway: RunningGateway) -> None:
    good, bad = post(LOAD, b"{}", close=False), post(LOAD, b"{}", "Origin: http://evil.example", close=False)
    found = gateway.exchange(good + good + bad + good)
    assert [part[:3] for part in found.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"403"]
    assert loads(gateway) == 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_as_it_is_loads_and_curl_as_a_page_does_not(gateway: RunningGateway) -> None:
    def curl(*options: str) -> str:
        url = f"http://localhost:{gateway.http_port}{LOAD}"
        command = ["curl", "-4", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-X", "POST", *options, url]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    assert [curl(), curl("-d", "{}")] == ["200", "200"]
    assert curl("-H", "Origin: http://evil.example") == "403"
    assert curl("-H", "Host: evil.example") == "403"


def test_stock_clients_load_models(gateway: RunningGateway) -> None:
    with closing(tritonclient.http.InferenceServerClient(f"localhost:{gateway.http_port}")) as over_http:
        over_http.load_model("ident")
        with pytest.raises(InferenceServerException, match="403"):
            over_http.load_model("ident", headers={"Origin": "http://evil.example"})
    with closing(tritonclient.grpc.InferenceServerClient(gateway.grpc_url)) as over_grpc:
        over_grpc.load_model("ident")
        over_grpc.load_model("ident", headers={"origin": "https://ui.example.com"})
        with pytest.raises(InferenceServerException, match=r"'Origin'.*evil\.example") as caught:
            over_grpc.load_model("ident", headers={"origin": "http://evil.example"})
        assert caught.value.status() == "StatusCode.PERMISSION_DENIED"
    assert loads(gateway) == 3


def test_every_rpc_that_changes_something_is_guarded_and_no_other(gateway: RunningGateway) -> None:
    with grpc.insecure_channel(gateway.grpc_url) as channel:
        for name, rpc in rpcs(INFERENCE_SERVICE).items():
            if rpc.client_streaming:
                continue
            path = f"/{INFERENCE_SERVICE}/{name}"
            call = channel.unary_unary(path, rpc.request.SerializeToString, rpc.response.FromString)
            code = grpc.StatusCode.OK
            try:
                call(rpc.request(), timeout=60, metadata=(("origin", "https://evil.example"),))
            except grpc.RpcError as error:
                code = error.code()
            refused = code is grpc.StatusCode.PERMISSION_DENIED
            assert refused is (right_of_rpc(path) is Right.ADMIN), (name, code)
    assert loads(gateway) == 0


def test_who_has_keys_need_not_say_whose_page_asks(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("keys")
    path = written(folder, entry("ops", "omega", "admin"))
    with running_gateway(folder, api_keys=path) as found:
        asked = request(LOAD, "models.example.net", "Origin: https://ui.example.net", "x-api-key: omega")
        assert ask(found, asked).status == 200


def test_with_tls_a_browser_has_checked_the_name_and_pages_are_still_told_apart(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("tls")
    files = certificates(folder)
    context = ssl.create_default_context(cafile=files.ca)
    with running_gateway(folder, **files.tls_settings()) as found:

        def status(*headers: str) -> int:
            plain = socket.create_connection(("127.0.0.1", found.http_port), timeout=60)
            with context.wrap_socket(plain, server_hostname="localhost") as client:
                client.sendall(request(LOAD, "models.example.net", *headers))
                return Found(client.makefile("rb").read()).status

        assert status() == 200
        assert status("Origin: https://models.example.net") == 200
        assert status("Origin: https://evil.example") == 403


def test_a_refused_name_is_logged_once(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with running_gateway(tmp_path_factory.mktemp("logs")) as found:
        for number in (0, 0, *range(40)):
            assert ask(found, request(LOAD, f"evil{number}.example")).status == 403
    told = [record.getMessage() for record in caplog.records if "trusted_hosts" in record.getMessage()]
    assert len(told) == 16
    assert "Host 'evil0.example'" in told[0]
