"""Certificates for tests: an authority of our own, a server's, a client's; as files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import trustme

from clockwork_serve.config import CLUSTER_NAME


@dataclass(frozen=True)
class Certificates:
    """Paths of PEM files. ``other_key`` belongs to no certificate here."""

    ca: str
    certificate: str
    key: str
    client_certificate: str
    client_key: str
    other_key: str

    def tls_settings(self, *, mutual: bool = False, **fields: object) -> dict[str, Any]:
        """Settings of a gateway that has TLS."""
        authority = self.ca if mutual else ""
        files = {"tls_certificate": self.certificate, "tls_key": self.key, "tls_client_ca": authority}
        return files | fields


@cache
def _made(generation: int) -> tuple[trustme.CA, trustme.LeafCert, trustme.LeafCert, trustme.LeafCert]:
    authority = trustme.CA()
    names = ("localhost", "127.0.0.1", CLUSTER_NAME)
    server, client = authority.issue_cert(*names), authority.issue_cert("client", CLUSTER_NAME)
    return authority, server, client, authority.issue_cert("x")


def certificates(folder: Path) -> Certificates:
    return _written(folder, 1)


def certificate_of(given: Certificates, folder: Path, name: str) -> Certificates:
    """The same, with a client's certificate of another name; in files of ``folder``."""
    leaf = _made(1)[0].issue_cert(name)
    chain, key = folder / "named.pem", folder / "named.key"
    leaf.private_key_pem.write_to_path(key)
    key.chmod(0o600)
    chain.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    return replace(given, client_certificate=str(chain), client_key=str(key))


def renewed_certificates(folder: Path) -> Certificates:
    """Others, of another authority."""
    return _written(folder, 2)


def _written(folder: Path, generation: int) -> Certificates:
    authority, server, client, other = _made(generation)
    found = Certificates(*(str(folder / f"{name}.pem") for name in Certificates.__dataclass_fields__))
    authority.cert_pem.write_to_path(found.ca)
    for leaf, chain, key in (
        (server, found.certificate, found.key),
        (client, found.client_certificate, found.client_key),
    ):
        leaf.private_key_pem.write_to_path(key)
        Path(chain).write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    other.private_key_pem.write_to_path(found.other_key)
    for key in (found.key, found.client_key, found.other_key):
        Path(key).chmod(0o600)
    return found
