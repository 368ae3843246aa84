"""What actors do without a Ray cluster: certificates that each side accepts; ends of processes."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from clockwork_serve.serve.remote.config import ClusterFiles, context_of
from harness.server import alive
from harness.serving import until

pytest.importorskip("ray", reason="Ray is not installed, for it is large: make engine does it")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clockwork_serve.apps.ray.actors import LAUNCH, PEM, Directory, _free_port
from clockwork_serve.apps.ray.deployment import ClusterRole


def role(name: str) -> ClusterRole:
    return ClusterRole(name=name, kind=name.partition("-")[0], number=0, words=(), cpus=1)


def files(folder: Path, directory: Directory, name: str, host: str) -> ClusterFiles:
    """Those of a role at an address."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    asked = x509.CertificateSigningRequestBuilder(subject).sign(key, hashes.SHA256())
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    contents = {
        "certificate": directory.certify(asked.public_bytes(PEM), host),
        "key": key.private_bytes(PEM, *form),
        "ca": directory.beat(role(name), "", "").authority,
    }
    for what, content in contents.items():
        (folder / f"{name}.{what}").write_bytes(content)
    return ClusterFiles(**{what: str(folder / f"{name}.{what}") for what in contents})


def shake_hands(client: ClusterFiles, server: ClusterFiles, host: str) -> None:
    """In memory. Raises SSLError if one refuses the other."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = context_of(client, server=False).wrap_bio(to_client, to_server, server_hostname=host)
    far = context_of(server, server=True).wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (near, far):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert near.version() == far.version() == "TLSv1.3"
    far.write(b"x")
    assert near.read() == b"x"


def test_roles_of_one_directory_accept_each_other_at_their_addresses(tmp_path: Path) -> None:
    directory = Directory()
    worker, controller = (files(tmp_path, directory, name, "10.0.0.1") for name in ("worker", "controller"))

    shake_hands(worker, controller, "10.0.0.1")

    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        shake_hands(worker, controller, "10.0.0.2")


def test_a_role_of_another_directory_is_a_stranger(tmp_path: Path) -> None:
    worker, controller = (files(tmp_path, Directory(), name, "10.0.0.1") for name in ("worker", "controller"))

    with pytest.raises(ssl.SSLError):
        shake_hands(worker, controller, "10.0.0.1")


def test_the_directory_knows_controllers_and_counts_lives() -> None:
    directory = Directory()
    directory.beat(role("controller-0"), "a", "10.0.0.1:7000")
    directory.beat(role("controller-0"), "a", "10.0.0.1:7000")
    moved = directory.beat(role("controller-0"), "b", "10.0.0.2:7000")
    assert (moved.controllers, moved.restarts) == ({"controller-0": "10.0.0.2:7000"}, 1)

    directory.forget("controller-0")

    assert directory.beat(role("gateway-0"), "a", "").controllers == {}


def test_a_process_ends_with_who_started_it_however_that_ended() -> None:
    script = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {LAUNCH!r}, str(os.getpid()), "/bin/sleep", "600"])
print(child.pid, flush=True)
child.wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as said:
        pid = int(said.readline())
    until("it runs", lambda: b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes(), 20)

    parent.send_signal(signal.SIGKILL)
    parent.wait()

    until("it has ended", lambda: not alive(pid), 20)


def test_a_process_whose_starter_is_gone_ends_at_once() -> None:
    stranger = os.getppid()
    ended = subprocess.run([sys.executable, "-c", LAUNCH, str(stranger), "/bin/false"], check=False)

    assert ended.returncode == 0


def test_a_controller_takes_the_port_that_it_had_on_the_same_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        assert _free_port("127.0.0.1", f"127.0.0.1:{port}") != port

    assert _free_port("127.0.0.1", f"127.0.0.1:{port}") == port
    assert _free_port("127.0.0.1", "127.0.0.11:7000") != 7000
