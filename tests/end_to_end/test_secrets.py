"""A server that knows secrets, provoked in every way: nothing that it writes or says holds one of them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import pytest

from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, rpcs
from harness.machine import children
from harness.server import name_of
from tests.end_to_end.commands import command, first_line
from tests.end_to_end.conftest import MOODY
from tests.serve.certificates import Certificates, certificates

GOOD, WEAK, WRONG = "sesame-open-Zk3vQ9-good", "sesame-open-Zk3vQ9-weak", "sesame-open-Zk3vQ9-wrong"
SHARED = "sesame-open-Zk3vQ9"
"""A part of each key."""
pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]


class Told:
    """Everything that was said by anybody, under the name of who said it."""

    def __init__(self, files: Certificates) -> None:
        self.said: list[tuple[str, bytes]] = []
        body = [line for line in Path(files.key).read_bytes().splitlines() if b"-----" not in line]
        keys = [base64.b64encode(key.encode()) for key in (GOOD, WEAK, WRONG)]
        self.secrets = [SHARED.encode(), SHARED.encode().hex().encode(), *keys, *body]
        assert all(len(secret) > 8 for secret in self.secrets)

    def add(self, who: str, what: bytes | str) -> None:
        self.said.append((who, what.encode(errors="replace") if isinstance(what, str) else what))

    def leaks(self) -> list[tuple[str, bytes]]:
        """Who told which secret, with some of what stands around it."""
        return [
            (who, what[max(0, at - 60) : at + 60])
            for who, what in self.said
            for secret in self.secrets
            if (at := what.find(secret)) >= 0
        ]


@contextmanager
def running(arguments: list[str], told: Told) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    process = subprocess.Popen(
        [*arguments, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"CLOCKWORK_LOG_LEVEL": "debug"},
    )  # fmt: skip
    try:
        line = first_line(process)
        told.add("ready", line)
        yield process, json.loads(line)
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            out, errors = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
        told.add("stdout", out)
        told.add("stderr", errors)


def ask(told: Told, url: str, context: ssl.SSLContext, body: bytes | None = None, **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data=body, headers=named)
    try:
        with urllib.request.urlopen(request, timeout=60, context=context) as response:
            status, text, found = response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        status, text, found = error.code, error.read(), error.headers
    except OSError as error:
        told.add(url, str(error))
        return 0
    told.add(url, text + str(found).encode())
    return status


def raw(told: Told, ready: dict[str, Any], context: ssl.SSLContext, data: bytes) -> None:
    """Bytes that are no good request, over TLS."""
    host, port = ready["http"].removeprefix("https://").rsplit(":", 1)
    with (
        suppress(OSError),
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        secure.sendall(data)
        secure.settimeout(1)
        told.add("raw", secure.recv(65_536))


def over_grpc(told: Told, ready: dict[str, Any], files: Certificates) -> None:
    credentials = grpc.ssl_channel_credentials(Path(files.ca).read_bytes())
    with grpc.secure_channel(ready["grpc"], credentials) as channel:
        for name, message in (
            ("ModelInfer", b"\xff\xff"),
            ("RepositoryModelLoad", b""),
            ("ServerMetadata", b""),
        ):
            method = channel.unary_unary(f"/{INFERENCE_SERVICE}/{name}")
            assert name in rpcs(INFERENCE_SERVICE)
            for key in (GOOD, WEAK, WRONG):
                for metadata in ((("authorization", f"Bearer {key}"),), (("x-api-key", key),)):
                    try:
                        told.add("grpc", method(message, metadata=metadata, timeout=60))
                    except grpc.RpcError as error:
                        told.add("grpc", f"{error} {error.trailing_metadata()}")  # type: ignore[attr-defined]


def provoke(told: Told, ready: dict[str, Any], files: Certificates) -> list[int]:
    """Errors of every kind; what they were answered with."""
    context = ssl.create_default_context(cafile=files.ca)
    url = ready["http"]
    body = json.dumps(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [4], "data": [13.0] * 4}]}
    ).encode()
    found = []
    for key in (GOOD, WEAK, WRONG):
        for how in ({"Authorization": f"Bearer {key}"}, {"Authorization": key}, {"X-Api-Key": key}):
            for path, what in (
                ("/v2/models/moody/infer", body), ("/v2/models/moody/infer", b"{"), ("/v2/nowhere", None),
                ("/v2/models/nobody/infer", body), ("/v2/repository/models/moody/load", b"{}"),
                ("/v2/repository/models/nobody/load", b"{}"), ("/v2/repository/models/moody/unload", b"[1]"),
                ("/v2/models/stats", None), ("/metrics", None), ("/v2/logging", b'{"log_info": "x"}'),
            ):  # fmt: skip
                found.append(ask(told, url + path, context, what, **how))
        found.append(ask(told, ready["metrics"], context, Authorization=f"Bearer {key}"))
        bearer = b"Authorization: Bearer " + key.encode()
        for data in (
            b"GET /v2 HTTP/1.1\r\n" + bearer + b"\0\r\n\r\n", bearer + b"\r\n\r\n",
            b"POST /v2/models/moody/infer HTTP/1.1\r\n" + bearer + b"\r\nContent-Length: -1\r\n\r\n",
            b"GET /v2 HTTP/1.1\r\n" + bearer * 2000 + b"\r\n\r\n",
            b"GET /v2 HTTP/1.1\r\n" + bearer + b"\r\n" + bearer + b"\r\nx-slo-ms: soon\r\n\r\n",
            b"POST /v2/models/moody/infer HTTP/1.1\r\n" + bearer + b"\r\nContent-Encoding: br\r\n"
            b"Content-Length: 2\r\n\r\n{}",
        ):  # fmt: skip
            raw(told, ready, context, data)
    over_grpc(told, ready, files)
    return found


ENTRY = '[[keys]]\nname = "%s"\nsha256 = "%s"\nmay = %s\n'
TENSORS = '[{name = "%s", dims = [4], datatype = "FP32"}]'


def laid_out(root: Path) -> Path:
    """A repository with one model, and the file of keys beside it."""
    model = root / "models" / "moody"
    (model / "1").mkdir(parents=True)
    (model / "1" / "model.py").write_text(MOODY)
    (model / "clockwork.toml").write_text(f"inputs = {TENSORS % 'x'}\noutputs = {TENSORS % 'y'}\n")
    keys = root / "keys.toml"
    rights = (("good", GOOD, '["infer", "admin", "metrics"]'), ("weak", WEAK, '["metrics"]'))
    keys.write_text(
        "".join(ENTRY % (name, sha256(key.encode()).hexdigest(), may) for name, key, may in rights)
    )
    keys.chmod(0o600)
    return keys


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a server makes its private folder; names of sockets are short there."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


def test_no_secret_is_ever_told(tmp_path: Path, cache: Path, run: Path) -> None:
    files = certificates(tmp_path)
    told = Told(files)
    told.add("the test itself", GOOD)
    keys, journal = laid_out(tmp_path), tmp_path / "journal"
    options = [
        "--tls-certificate", files.certificate, "--tls-key", files.key, "--api-keys", str(keys),
        "--journal", str(journal), "--gateways", "2",
    ]  # fmt: skip
    with running(command(tmp_path / "models", cache, *options), told) as (process, ready):
        statuses = set(provoke(told, ready, files))
        everybody = [process.pid, *children(process.pid)]
        for pid in everybody:
            told.add(f"cmdline {pid}", Path(f"/proc/{pid}/cmdline").read_bytes())
            told.add(f"environ {pid}", Path(f"/proc/{pid}/environ").read_bytes())
        # An operator puts the key itself where its hash belongs, and the private key for the certificate.
        shutil.copy(files.key, files.certificate)
        keys.write_text(ENTRY % ("new", GOOD, '["infer"]'))
        commands(told, ready, files, tmp_path)
        time.sleep(4)
        os.kill(next(pid for pid in everybody if name_of(pid) == "gateway-1"), signal.SIGABRT)
        time.sleep(2)
        provoke(told, ready, files)
        for path in run.rglob("*"):
            if path.is_file():
                told.add(str(path), path.read_bytes())
    told.add("journal", journal.read_bytes())

    assert [who for who, _ in told.leaks()] == ["the test itself"], told.leaks()
    assert {200, 400, 401, 403, 404, 500} <= statuses, statuses
    said = b"".join(what for _, what in told.said)
    assert b"thirteen is not served" in said and b"API key: expected" in said and b"killed by SIGABRT" in said
    assert journal.stat().st_size


def commands(told: Told, ready: dict[str, Any], files: Certificates, tmp_path: Path) -> None:
    """Our own commands with a key that will not do, and with files that hold secrets in the wrong places."""
    url = ["--url", ready["http"], "--ca", files.ca]
    tries: list[tuple[list[str], dict[str, str]]] = [
        (["models", *url, "load", "nobody"], {"CLOCKWORK_API_KEY": WRONG}),
        (["models", "--url", "https://127.0.0.1:1", "list"], {"CLOCKWORK_API_KEY": GOOD}),
        (["models", *url, "--json", "list"], {"CLOCKWORK_API_KEY": f"{GOOD}\n{GOOD}"}),
        (["serve", str(tmp_path / "models"), "--api-keys", files.key], {}),
        (["serve", str(tmp_path / "models"), "--tls-certificate", files.key, "--tls-key", files.key], {}),
        (["serve", str(tmp_path / "models"), "--config", files.key], {}),
        (["serve", str(tmp_path / "models"), "--config", str(tmp_path / "keys.toml"), "--json"], {}),
        (["serve", str(tmp_path / "models"), "--api-keys", str(tmp_path / "keys.toml"), "--json"], {}),
        (["validate", str(tmp_path / "models"), "--json"], {"CLOCKWORK_API_KEY": GOOD}),
    ]
    for words, variables in tries:
        done = subprocess.run(
            [sys.executable, "-m", "clockwork_serve", *words], capture_output=True, timeout=60, check=False,
            env=os.environ | variables,
        )  # fmt: skip
        told.add(" ".join(words[:4]), done.stdout + done.stderr)
