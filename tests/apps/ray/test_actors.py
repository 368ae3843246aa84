"""What actors do without a Ray cluster: certificates that each side accepts; ends of processes."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509

from clockwork_serve.apps.ray.deployment import ClusterRole
from clockwork_serve.config import CLUSTER_NAME
from clockwork_serve.serve.remote.config import ClusterFiles, context_of
from harness.server import alive
from harness.serving import until
from tests.apps.ray.fake import faked

pytest.importorskip("cryptography", reason="it comes with the extra `ray`")


@pytest.fixture(scope="module")
def actors() -> Iterator[Any]:
    """The module, without a Ray cluster."""
    with faked() as (_, actors, _):
        yield actors


def role(name: str) -> ClusterRole:
    return ClusterRole(name=name, kind=name.partition("-")[0], number=0, words=(), cpus=1)


def files(folder: Path, credentials: Any) -> ClusterFiles:
    """Those of every role of a deployment."""
    folder.mkdir()
    for what, content in msgspec.structs.asdict(credentials).items():
        (folder / what).write_bytes(content)
    certificate, key = str(folder / "certificate"), str(folder / "key")
    return ClusterFiles(certificate=certificate, key=key, ca=certificate)


def shake_hands(client: ClusterFiles, server: ClusterFiles) -> None:
    """In memory. Raises SSLError if one refuses the other."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    contexts = context_of(client, server=False), context_of(server, server=True)
    for context in contexts:
        context.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python does from 3.13 on
    near = contexts[0].wrap_bio(to_client, to_server, server_hostname=contexts[0].files.name)
    far = contexts[1].wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (near, far):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert near.version() == far.version() == "TLSv1.3"
    far.write(b"x")
    assert near.read() == b"x"


def test_roles_accept_each_other_by_a_name_and_no_address_is_in_their_certificate(
    tmp_path: Path, actors: Any
) -> None:
    credentials = actors.new_credentials()
    found = files(tmp_path / "own", credentials)

    shake_hands(found, found)

    certificate = x509.load_pem_x509_certificate(credentials.certificate)
    named = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(named) == [x509.DNSName(CLUSTER_NAME)]


def test_a_role_of_another_deployment_is_a_stranger(tmp_path: Path, actors: Any) -> None:
    own, other = (files(tmp_path / name, actors.new_credentials()) for name in ("own", "other"))

    with pytest.raises(ssl.SSLError):
        shake_hands(own, other)


def test_the_directory_knows_roles_and_controllers_and_counts_lives(actors: Any) -> None:
    directory = actors.Directory(actors.new_credentials())
    directory.beat(role("controller-0"), "a", "10.0.0.1:7000")
    directory.beat(role("controller-0"), "a", "10.0.0.1:7000")
    moved = directory.beat(role("controller-0"), "b", "10.0.0.2:7000")
    assert (moved.controllers, moved.restarts) == ({"controller-0": "10.0.0.2:7000"}, 1)

    directory.forget("controller-0")

    assert directory.beat(role("gateway-0"), "a", "").controllers == {}
    assert directory.roles() == {"gateway-0": role("gateway-0")}


def test_the_next_actor_on_a_node_removes_what_one_that_is_gone_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, actors: Any
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    there, lock = actors._private_folder("there")
    lost, lost_lock = actors._private_folder("lost")
    (there / "key.pem").touch()
    (lost / "key.pem").touch()
    os.close(lost_lock)  # as the kernel does when its actor ends

    again, _ = actors._private_folder("again")

    assert sorted(each for each in again.parent.iterdir() if each.is_dir()) == [again, there]
    assert (there / "key.pem").exists()
    os.close(lock)


def test_a_process_ends_with_who_started_it_however_that_ended(actors: Any) -> None:
    script = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {actors.LAUNCH!r}, str(os.getpid()), "/bin/sleep", "600"])
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


def test_a_process_whose_starter_is_gone_ends_at_once(actors: Any) -> None:
    stranger = os.getppid()
    ended = subprocess.run([sys.executable, "-c", actors.LAUNCH, str(stranger), "/bin/false"], check=False)

    assert ended.returncode == 0


def test_a_controller_takes_the_port_that_it_had_on_the_same_address(actors: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        assert actors._free_port("127.0.0.1", f"127.0.0.1:{port}") != port

    assert actors._free_port("127.0.0.1", f"127.0.0.1:{port}") == port
    assert actors._free_port("127.0.0.1", "127.0.0.11:7000") != 7000
