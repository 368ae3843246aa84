"""Both clients over TLS: a certificate that is not known is refused, one that is named is not."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess

import pytest

from clockwork_client import AsyncClient, Client, NotServing
from tests.client.scripted import OK, request, scripted

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    """A server's and a client's, with a certificate for 127.0.0.1 made for this test."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1",
            "-keyout", str(key), "-out", str(certificate),
        ],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=str(certificate))


def secret(context):
    """Answers one request over TLS, if the client wants any."""

    def script(connection):
        try:
            with context.wrap_socket(connection, server_side=True) as inside:
                if request(inside):
                    inside.sendall(OK)
                    inside.recv(1)
        except OSError:
            pass

    return script


async def asked(url, tls):
    async with AsyncClient(url, tls=tls) as client:
        return await client.metadata()


def test_a_named_certificate_is_trusted(contexts):
    server, trusting = contexts
    with scripted(secret(server), secret(server)) as address:
        with Client(f"https://{address}", tls=trusting) as client:
            assert client.metadata().name == "mock"
        assert asyncio.run(asked(f"https://{address}", trusting)).name == "mock"


def test_another_certificate_is_not(contexts):
    server, _ = contexts
    with scripted(secret(server), secret(server)) as address:
        with Client(f"https://{address}") as client, pytest.raises(NotServing, match="certificate"):
            client.metadata()
        with pytest.raises(NotServing, match="certificate"):
            asyncio.run(asked(f"https://{address}", None))
