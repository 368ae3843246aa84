"""TLS on a gateway's ports, with stock and with misbehaving clients; invalid files."""

from __future__ import annotations

import gc
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve import accepting
from clockwork_serve.serve.gateway.tls import TlsFiles, server_context
from clockwork_serve.serve.http.server import SPARE_CONNECTIONS
from tests.serve.certificates import Certificates, certificates, renewed_certificates
from tests.serve.gateway.running import RunningGateway, running_gateway, until
from tests.serve.http.requests import INFER, X, get, post, tensor

# What the stock client does to check a name, and its destructor, are no business of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*InferenceServerClient.__del__"),
    pytest.mark.filterwarnings("ignore:ssl.match_hostname"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, files: Certificates) -> Iterator[RunningGateway]:
    door = files.tls_settings(head_s=3.0, max_connections=20)
    with running_gateway(tmp_path_factory.mktemp("gateway"), grpc_port=0, metrics_port=0, **door) as found:
        yield found
    gc.collect()  # what stock clients left, in their own thread


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory, files: Certificates) -> Iterator[RunningGateway]:
    with running_gateway(
        tmp_path_factory.mktemp("gateway"), grpc_port=0, **files.tls_settings(mutual=True)
    ) as found:
        yield found
    gc.collect()  # what stock clients left, in their own thread


def trusting(files: Certificates, *, known: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=files.ca)
    if known:
        context.load_cert_chain(files.client_certificate, files.client_key)
    return context


def http_client(gateway: RunningGateway, context: ssl.SSLContext) -> Any:
    return tritonclient.http.InferenceServerClient(
        gateway.http_url, ssl=True, ssl_context_factory=lambda: context
    )


def grpc_client(gateway: RunningGateway, files: Certificates, *, known: bool = False) -> Any:
    pair = (files.client_key, files.client_certificate) if known else (None, None)
    return tritonclient.grpc.InferenceServerClient(
        gateway.grpc_url, ssl=True, root_certificates=files.ca, private_key=pair[0], certificate_chain=pair[1]
    )


def over_tls(gateway: RunningGateway, context: ssl.SSLContext, sent: bytes, port: int = 0) -> bytes:
    with (
        socket.create_connection(("127.0.0.1", port or gateway.http_port), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as client,
    ):
        client.sendall(sent)
        found = b""
        while part := client.recv(65536):
            found += part
        return found


@pytest.mark.parametrize("count", [2, 1_000_000])
def test_stock_clients_get_their_answers(gateway: RunningGateway, files: Certificates, count: int) -> None:
    data = np.arange(count, dtype=np.float32)
    for client in (http_client(gateway, trusting(files)), grpc_client(gateway, files)):
        with closing(client):
            assert client.is_server_ready()
            for _ in range(3):
                module = tritonclient.http if "http" in type(client).__module__ else tritonclient.grpc
                asked = module.InferInput("X", [count], "FP32")
                asked.set_data_from_numpy(data)
                np.testing.assert_array_equal(client.infer("any", [asked]).as_numpy("Y"), data)


def test_the_metrics_port_has_tls_too(gateway: RunningGateway, files: Certificates) -> None:
    port = gateway.servers.port_by_name["metrics_port"]
    found = over_tls(gateway, trusting(files), get("/v2/health/live"), port)
    assert found.startswith(b"HTTP/1.1 200 OK")


def test_curl_gets_its_answer(gateway: RunningGateway, files: Certificates) -> None:
    url = f"https://localhost:{gateway.http_port}/v2/health/live"
    found = subprocess.run(
        ["curl", "-sS", "--cacert", files.ca, url], capture_output=True, timeout=60, check=False
    )
    assert (found.stdout, found.stderr) == (b'{"live":true}', b"")


def test_a_client_that_trusts_another_authority_cannot_connect(gateway: RunningGateway) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        over_tls(gateway, ssl.create_default_context(), get("/v2"))


def test_a_client_with_a_valid_certificate_can_connect(mutual: RunningGateway, files: Certificates) -> None:
    with closing(http_client(mutual, trusting(files, known=True))) as client:
        np.testing.assert_array_equal(client.infer("ident", [tensor("X", X, "FP32")]).as_numpy("Y"), X)
    with closing(grpc_client(mutual, files, known=True)) as client:
        assert client.is_server_live()


def test_a_client_without_a_certificate_cannot_connect(mutual: RunningGateway, files: Certificates) -> None:
    # With TLS 1.3 the server's rejection follows the client's handshake; that it hung up may be seen first.
    with suppress(ssl.SSLError, ConnectionError):
        assert over_tls(mutual, trusting(files), get("/v2/health/live")) == b""
    with closing(grpc_client(mutual, files)) as client, pytest.raises(InferenceServerException):
        client.is_server_live(client_timeout=5)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
@pytest.mark.parametrize("port", ["http_port", "grpc_port"])
@pytest.mark.parametrize(("version", "spoken"), [("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)])
def test_tls_1_2_is_the_oldest_version(
    gateway: RunningGateway, files: Certificates, port: str, version: str, *, spoken: bool
) -> None:
    context = trusting(files)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    address = ("127.0.0.1", gateway.servers.port_by_name[port])
    with socket.create_connection(address, timeout=60) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="localhost") as client:
                assert client.version() == version.replace("_", ".")
            found = True
        except (ssl.SSLError, ConnectionError):
            found = False
    assert found is spoken


def test_two_gateways_share_their_ports(gateway: RunningGateway, files: Certificates, tmp_path: Path) -> None:
    with running_gateway(tmp_path, reuse_port=True, grpc_port=0, **files.tls_settings()) as first:
        ports = first.servers.port_by_name
        folder = tmp_path / "second"
        folder.mkdir()
        with running_gateway(folder, name="g1", reuse_port=True, **files.tls_settings(), **ports) as second:
            assert second.servers.port_by_name == ports
            # The system spreads connections over both.
            until(
                lambda: (
                    over_tls(first, trusting(files), post(INFER, b"{}")) and first.servers.gateway._received
                    and second.servers.gateway._received
                )
            )  # fmt: skip


def test_a_stalled_handshake_times_out_and_others_can_connect(
    gateway: RunningGateway, files: Certificates
) -> None:
    silent = [gateway.connect() for _ in range(40)]
    garbage = [gateway.connect() for _ in range(40)]
    for client in garbage:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    # More than max_connections and the few that get a response: these are closed unread.
    more = [gateway.connect() for _ in range(60)]
    assert all(ended(client) for client in (*garbage, *silent, *more))
    assert over_tls(gateway, trusting(files), get("/v2/health/live")).startswith(b"HTTP/1.1 200")
    (server,) = gateway.servers.http._servers
    until(lambda: not server._handshaking and not gateway.servers.gateway.connections)


def test_concurrent_handshakes_are_limited(
    files: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "PATIENCE_S", 60.0)
    door = files.tls_settings(max_connections=1)
    with running_gateway(tmp_path, **door) as found:
        silent = [found.connect() for _ in range(1 + SPARE_CONNECTIONS)]
        more = [found.connect() for _ in range(20)]
        assert all(ended(client) for client in more)
        for client in silent:
            client.setblocking(False)
            with client, pytest.raises(BlockingIOError):
                client.recv(1)
        until(lambda: serves(found, files))


def ended(client: socket.socket) -> bool:
    with client:
        try:
            while client.recv(65536):
                pass
        except ConnectionError:
            pass
        return True


def test_a_rejection_is_received_completely(gateway: RunningGateway, files: Certificates) -> None:
    sent = b"POST /v2 HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n" + bytes(500_000)
    found = over_tls(gateway, trusting(files), sent)
    assert found.startswith(b"HTTP/1.1 413")
    assert found.endswith(b"raise the server's max_body\"}")


def test_a_renewed_certificate_is_used_from_the_next_handshake(tmp_path: Path) -> None:
    (old := tmp_path / "old").mkdir()
    (new := tmp_path / "new").mkdir()
    files, others = certificates(old), renewed_certificates(new)
    with running_gateway(tmp_path, grpc_port=0, **files.tls_settings()) as found:
        with closing(grpc_client(found, files)) as client:
            assert client.is_server_live()
        # For a moment key and certificate do not fit.
        Path(others.key).replace(files.key)
        time.sleep(2.5)
        assert over_tls(found, trusting(files), get("/v2/health/live")).startswith(b"HTTP/1.1 200")
        Path(others.certificate).replace(files.certificate)
        until(lambda: serves(found, others))
        with pytest.raises(ssl.SSLCertVerificationError):
            over_tls(found, trusting(files), get("/v2"))
        with closing(grpc_client(found, others)) as client:
            assert client.is_server_live()


def serves(gateway: RunningGateway, files: Certificates) -> bool:
    try:
        return over_tls(gateway, trusting(files), get("/v2/health/live")).startswith(b"HTTP/1.1 200")
    except (ssl.SSLError, ConnectionError):
        return False


# Files that will not do


def encrypted(folder: Path, key: str) -> str:
    from cryptography.hazmat.primitives import serialization as s

    found = s.load_pem_private_key(Path(key).read_bytes(), None)
    path = folder / "encrypted.pem"
    path.write_bytes(
        found.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret"))
    )
    return str(path)


@pytest.mark.parametrize(
    ("setting", "make", "expected", "found"),
    [
        ("certificate", lambda files, folder: str(folder / "no.pem"), "a readable file", "No such file"),
        ("certificate", lambda files, folder: str(folder), "a readable file", "Is a directory"),
        ("certificate", lambda files, folder: files.key, "a certificate in PEM form", ""),
        ("key", lambda files, folder: str(folder / "no.pem"), "a readable file", "No such file"),
        ("key", lambda files, folder: files.certificate, "a private key in PEM form", "other content"),
        ("key", lambda files, folder: files.other_key, "the key of", "another key"),
        ("key", lambda files, folder: encrypted(folder, files.key), "without a passphrase", "encrypted"),
        ("client_ca", lambda files, folder: str(folder / "no.pem"), "a readable file", "No such file"),
        ("client_ca", lambda files, folder: files.key, "certificates of authorities in PEM form", ""),
    ],
)
def test_an_invalid_file_is_named(
    files: Certificates, tmp_path: Path, setting: str, make: Any, expected: str, found: str
) -> None:
    path = make(files, tmp_path)
    fields = {"certificate": files.certificate, "key": files.key, "client_ca": files.ca} | {setting: path}
    with pytest.raises(ConfigError) as caught:
        server_context(TlsFiles(**fields))
    message = str(caught.value)
    assert message.startswith(f"tls_{setting}: expected ")
    assert expected in message
    assert found in message
    assert path in message


def test_grpc_accepts_encrypted_connections_only(gateway: RunningGateway) -> None:
    with grpc.insecure_channel(gateway.grpc_url) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=3)
