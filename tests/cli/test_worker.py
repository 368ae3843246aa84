"""``clockwork worker``, and ``clockwork serve`` with a port for workers: errors when a setting is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.certificates import certificates

pytestmark = pytest.mark.system


def clockwork(*words: str) -> tuple[int, str]:
    """The exit code, and what it printed."""
    command = [sys.executable, "-m", "clockwork_serve", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stderr


def test_without_a_server_to_join_it_says_how_to_name_one() -> None:
    code, said = clockwork("worker")
    assert code == 2
    assert "controller: expected HOST:PORT of a server that was started with --listen-machines" in said


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.1:0", "10.0.0.1:70000", ":7000", "http://h:1"])
def test_what_is_no_address_is_named(address: str) -> None:
    code, said = clockwork("worker", "--controller", address)
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
            code, said = clockwork(*command, *given)
            assert code == 2, said
            assert f"{lacking}: expected a PEM file, as" in said
            assert "name all three" in said


def test_a_name_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    code, said = clockwork("worker", "--controller", "127.0.0.1:7000", "--machine-name", "a b")
    assert code == 2
    assert "machine_name (from --machine-name): expected up to 64 letters" in said


def test_serve_takes_no_setting_that_is_for_workers_alone(repository: Path) -> None:
    code, said = clockwork("serve", str(repository), "--controller", "127.0.0.1:7000")
    assert code == 2
    assert "No such option" in said
