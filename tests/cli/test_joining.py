"""``clockwork gateway`` and ``worker``, and ``serve`` with a port for them: errors of their settings."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.certificates import certificates

# ``clockwork gateway``: its errors when a setting is missing.


pytestmark = pytest.mark.system

SERVER = ("--controller", "127.0.0.1:7000")


def clockwork(*words: str) -> tuple[int, str, str]:
    """The exit code, and what it printed on standard output and standard error."""
    command = [sys.executable, "-m", "clockwork_serve", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stdout, ended.stderr


def files(folder: Path) -> dict[str, str]:
    made = certificates(folder)
    return {
        "--cluster-certificate": made.client_certificate,
        "--cluster-key": made.client_key,
        "--cluster-ca": made.ca,
    }


def words(options: dict[str, str]) -> list[str]:
    return [word for option in options.items() for word in option]


@pytest.fixture(autouse=True)
def nobody_s_settings(repository: Path) -> None:
    """As in the other tests of commands."""


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as held:
        yield str(held.getsockname()[1])


def test_it_is_among_the_commands_and_explains_itself() -> None:
    code, said, _ = clockwork("--help")
    assert code == 0
    assert "  gateway     Serve clients on this machine" in said
    assert "  controller  Lead workers and gateways" in said
    code, said, _ = clockwork("gateway", "--help")
    assert code == 0
    for option in ("--controller HOST:PORT", "--machine-name", "--cluster-ca", "--http-port", "--json"):
        assert option in said
    assert "--device" not in said


def test_without_a_server_to_serve_for_it_says_how_to_name_one() -> None:
    code, _, said = clockwork("gateway")
    assert code == 2
    assert "controller: expected HOST:PORT of a server that was started with --listen-machines" in said


@pytest.mark.parametrize("lacking", ["certificate", "key", "ca"])
def test_without_one_of_its_certificates_it_joins_nothing(tmp_path: Path, lacking: str) -> None:
    given = files(tmp_path)
    del given[f"--cluster-{lacking}"]
    code, _, said = clockwork("gateway", *SERVER, *words(given))
    assert code == 2
    assert f"cluster_{lacking}: expected a PEM file, as a gateway on another machine needs" in said
    assert "name all three" in said


@pytest.mark.parametrize("name", ["a b", "-a", "x" * 65, "a/b"])
def test_a_name_that_cannot_be_one_is_refused(tmp_path: Path, name: str) -> None:
    code, _, said = clockwork("gateway", *SERVER, *words(files(tmp_path)), f"--machine-name={name}")
    assert code == 2
    assert "machine_name (from --machine-name): expected up to 64 letters" in said


@pytest.mark.parametrize("port", ["http", "grpc", "metrics"])
def test_a_port_that_is_taken_is_named_and_nothing_is_started(tmp_path: Path, taken: str, port: str) -> None:
    ports = {"--http-port": "0", "--grpc-port": "0", "--metrics-port": "0"} | {f"--{port}-port": taken}
    code, out, said = clockwork("gateway", *SERVER, *words(files(tmp_path)), *words(ports), "--json")
    assert (code, out) == (2, "")
    assert f"{port}_port: expected a free port; found {taken} on 127.0.0.1 taken by another program" in said
    assert said.count("\n") == 1


def test_settings_are_taken_where_they_mean_something_and_nowhere_else(repository: Path) -> None:
    for command, option in (
        (("serve", str(repository)), "--machine-name"),
        (("serve", str(repository)), "--controller"),
        (("gateway", *SERVER), "--device"),
        (("gateway", *SERVER), "--listen-machines"),
        (("gateway", *SERVER), "--journal"),
    ):
        code, _, said = clockwork(*command, option, "x")
        assert code == 2
        assert f"No such option: {option}" in said or f"No such option '{option}'" in said


# ``clockwork worker``, and ``clockwork serve`` with a port for workers: errors when a setting is missing.


def test_without_a_server_to_join_it_says_how_to_name_one() -> None:
    code, _, said = clockwork("worker")
    assert code == 2
    assert "controller: expected HOST:PORT of a server that was started with --listen-machines" in said


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.1:0", "10.0.0.1:70000", ":7000", "http://h:1"])
def test_what_is_no_address_is_named(address: str) -> None:
    code, _, said = clockwork("worker", "--controller", address)
    assert code == 2
    assert "controller (from --controller): expected an address and a port" in said


def test_without_certificates_nothing_is_opened_or_joined(repository: Path, tmp_path: Path) -> None:
    made = certificates(tmp_path)
    two = ("--cluster-certificate", made.certificate, "--cluster-key", made.key)
    for command in (
        ("serve", str(repository), "--listen-machines", "127.0.0.1:7000"),
        ("worker", "--controller", "127.0.0.1:7000"),
    ):
        for given, lacking in (((), "cluster_certificate"), (two, "cluster_ca")):
            code, _, said = clockwork(*command, *given)
            assert code == 2, said
            assert f"{lacking}: expected a PEM file, as" in said
            assert "name all three" in said


def test_a_worker_without_the_server_s_store_joins_nothing(tmp_path: Path) -> None:
    code, _, said = clockwork("worker", *SERVER, *words(files(tmp_path)))
    assert code == 2
    assert "store: expected the shared store of the server" in said
    assert "clockwork serve and to clockwork worker with --store" in said


def test_a_worker_whose_store_no_library_reaches_ends_before_it_joins(tmp_path: Path) -> None:
    code, _, said = clockwork("worker", *SERVER, *words(files(tmp_path)), "--store", "nowhere://of/ours")
    assert code == 2
    assert said.startswith("error: repository: store: expected a folder, or a URL that fsspec"), said
    assert (said.count("\n"), "found nowhere://of/ours" in said) == (1, True)


def test_a_name_that_cannot_be_one_is_refused_for_workers(tmp_path: Path) -> None:
    code, _, said = clockwork("worker", "--controller", "127.0.0.1:7000", "--machine-name", "a b")
    assert code == 2
    assert "machine_name (from --machine-name): expected up to 64 letters" in said


def test_serve_takes_no_setting_that_is_for_workers_alone(repository: Path) -> None:
    code, _, said = clockwork("serve", str(repository), "--controller", "127.0.0.1:7000")
    assert code == 2
    assert "No such option" in said


# ``clockwork controller``, and several of them to join.


def test_a_controller_says_what_it_needs(tmp_path: Path) -> None:
    code, said, _ = clockwork("controller", "--help")
    assert code == 0
    for option in ("--store FOLDER|URL", "--listen-machines HOST:PORT", "--lease-s", "--metrics-port"):
        assert option in said
    for option in ("--device", "--http-port", "--gateways"):
        assert option not in said
    store = str(tmp_path)
    files = words(joined_files(tmp_path))
    for given, wanted in (
        ((), "store: expected the shared store"),
        (("--store", store), "listen_machines: expected HOST:PORT"),
        (("--store", store, "--listen-machines", "127.0.0.1:7000"), "store: expected a catalogue"),
        (("--store", f"{store}/none", "--listen-machines", "127.0.0.1:7000", *files), "no such folder"),
    ):
        code, _, said = clockwork("controller", *given)
        assert code in (1, 2)
        assert wanted in said


def joined_files(folder: Path) -> dict[str, str]:
    made = certificates(folder)
    return {
        "--cluster-certificate": made.certificate, "--cluster-key": made.key, "--cluster-ca": made.ca,
    }  # fmt: skip


def test_of_several_controllers_each_has_an_address_and_a_port() -> None:
    code, _, said = clockwork("worker", "--controller", "10.0.0.1:7000,10.0.0.2")
    assert code == 2
    assert "expected an address and a port, or several with commas between" in said
    code, _, said = clockwork("gateway", "--controller", "10.0.0.1:7000, b:7000")
    assert code == 2
    assert "cluster_certificate: expected a PEM file" in said
