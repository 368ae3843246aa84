"""Certificates of our own machines: what is wrong with a file is said, naming the setting."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from msgspec import structs

from clockwork_serve.config import Settings
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.remote.config import ClusterContext, ClusterFiles, check_listening, context_of
from tests.serve.certificates import certificates


def files(folder: Path) -> ClusterFiles:
    made = certificates(folder)
    return ClusterFiles(certificate=made.certificate, key=made.key, ca=made.ca)


@pytest.mark.parametrize("missing", ["certificate", "key", "ca"])
def test_all_three_files_are_needed(tmp_path: Path, missing: str) -> None:
    given = structs.replace(files(tmp_path), **{missing: ""})
    with pytest.raises(
        ConfigError, match=f"cluster_{missing}: expected a PEM file, as listen_machines needs"
    ):
        given.check("listen_machines")


def test_no_port_is_opened_without_them(tmp_path: Path) -> None:
    for given in (ClusterFiles(), structs.replace(files(tmp_path), ca="")):
        with pytest.raises(ConfigError, match="name all three"):
            check_listening(Settings(listen_machines="127.0.0.1:1", **given.named()))


def test_a_file_that_will_not_do_is_named_with_what_it_holds(tmp_path: Path) -> None:
    good = files(tmp_path)
    other, empty = certificates(tmp_path).other_key, tmp_path / "empty.pem"
    empty.write_text("nothing")
    cases = {
        r"cluster_key: expected the key of .*; found another key": {"key": other},
        r"cluster_key: expected a private key in PEM form; found other content": {"key": str(empty)},
        r"cluster_certificate: expected a certificate in PEM form": {"certificate": str(empty)},
        r"cluster_ca: expected certificates of authorities": {"ca": str(empty)},
        r"cluster_ca: expected a readable file; found No such file": {"ca": str(tmp_path / "none")},
    }
    for message, changed in cases.items():
        with pytest.raises(ConfigError, match=message):
            structs.replace(good, **changed).check("listen_machines")


def test_both_sides_want_a_certificate_and_the_newest_protocol(tmp_path: Path) -> None:
    for server in (True, False):
        context = context_of(files(tmp_path), server=server)
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert context.check_hostname is not server


def test_renewed_files_count_and_a_renewal_that_will_not_do_changes_nothing(tmp_path: Path) -> None:
    given = files(tmp_path)
    context = ClusterContext(given, server=True)
    first = context.now()
    assert context.now() is first
    text = Path(given.certificate).read_text()
    Path(given.certificate).write_text("half a fi")
    assert context.now() is first
    Path(given.certificate).write_text(text + "\n")
    assert context.now() is not first
