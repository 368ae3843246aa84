"""What links between machines are configured by, for both sides: names, settings, and TLS 1.3."""

from __future__ import annotations

import logging
import re
import socket
import ssl
from pathlib import Path
from typing import Final

from msgspec import Struct

from clockwork_serve.config import CLUSTER_NAME, Settings
from clockwork_serve.config.values import split_address
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.gateway import tls as pem
from clockwork_serve.serve.gateway.tls import Watched

# ------------------------------------------------------------
# TLS between the server's machines: both sides must have a certificate of the same authority.


PROTOCOL_NAME: Final = "clockwork-1"
"""The ALPN protocol that both sides must offer, so that other TLS clients are refused."""


_log = logging.getLogger(__name__)


HANDSHAKE_TURNS: Final = 3  # after so many turns of each side a handshake is over


class ClusterFiles(Struct, frozen=True, kw_only=True):
    """Paths of PEM files: this machine's certificate, its key, and the authority of all machines.

    ``name`` is what all certificates name, this machine's and those of others; no address counts.
    """

    certificate: str = ""
    key: str = ""
    ca: str = ""
    name: str = CLUSTER_NAME

    def check(self, asked_by: str) -> None:
        """Raise :class:`ConfigError` unless all three are there and fit; ``asked_by`` is what needs them."""
        for setting, path in self.named().items():
            if not path:
                raise ConfigError(
                    f"{setting}: expected a PEM file, as {asked_by} needs a certificate, its key and the "
                    "authority that signed those of all machines; found none; name all three"
                )
        context_of(self, server=True)
        error = _refusal_of_itself(self)
        if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code == _OTHER_NAME:
            raise ConfigError(
                f"cluster_certificate: expected one that names {self.name}, as all of the cluster do; found "
                f"another name, or addresses alone, in {self.certificate}; sign one with subjectAltName="
                f"DNS:{self.name}, or give all machines the name that theirs have with --cluster-name"
            )
        if Path(self.key).stat().st_mode & 0o004:
            _log.warning("cluster_key: every user of this host may read %s; chmod 600 it", self.key)

    def named(self) -> dict[str, str]:
        """The paths by setting."""
        return {"cluster_certificate": self.certificate, "cluster_key": self.key, "cluster_ca": self.ca}


class PeerContext(ssl.SSLContext):
    """The TLS context of one side, made of these ``files``; their ``name`` is that of the peer."""

    files = ClusterFiles()


def context_of(files: ClusterFiles, *, server: bool) -> PeerContext:
    """The TLS context of one side. Raises :class:`ConfigError` naming the setting of a file that is wrong."""
    for setting, path in files.named().items():
        pem.read(setting, path)
    context = PeerContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.files = files
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([PROTOCOL_NAME])
    pem.load_chain(context, "cluster", files.certificate, files.key)
    # Clients check the server's name, by check_hostname; a peer without a certificate is refused.
    pem.load_authorities(context, "cluster_ca", files.ca)
    return context


_OTHER_NAME: Final = 62  # X509_V_ERR_HOSTNAME_MISMATCH of OpenSSL


def refused_by_itself(files: ClusterFiles) -> str:
    """Why a machine with these files would not accept this very certificate; "" if it would.

    Where TLS refuses who connects, its server alone knows why: the connection is just closed.
    """
    try:
        error = _refusal_of_itself(files)
    except ConfigError as wrong:
        return str(wrong)
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"cluster_certificate: {files.certificate} is not accepted: {error.verify_message.rstrip('.')}"
    return "" if error is None else f"cluster_certificate: {pem.reason_of(error)}"


def _refusal_of_itself(files: ClusterFiles) -> ssl.SSLError | None:
    """The error of a machine that is shown its own certificate. Raises :class:`ConfigError`."""
    there, here = context_of(files, server=True), context_of(files, server=False)
    inbound, outbound = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        here.wrap_bio(inbound, outbound, server_hostname=files.name),
        there.wrap_bio(outbound, inbound, server_side=True),
    )
    for end in ends * HANDSHAKE_TURNS:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError as error:
            return error
    return None


class ClusterContext:
    """The context for new connections: renewed files apply from the next handshake on."""

    def __init__(self, files: ClusterFiles, *, server: bool) -> None:
        """Raises :class:`ConfigError` naming the setting."""
        self._watched = Watched(list(files.named().values()), lambda: context_of(files, server=server))

    def now(self) -> PeerContext:
        """The context for a connection made now."""
        self._watched.refresh()
        return self._watched.content


# ------------------------------------------------------------
# Settings, and the names of processes on other machines.


FAR_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\.[a-z-]+:\d{1,4}")
"""The form of the name of a worker on another machine, which is also its device's. The names of the server's
own workers have no dot, so the two cannot collide."""


FAR_GATEWAY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\.gateway-\d{1,2}")
"""The form of the name of a gateway on another machine, which does not collide for the same reason."""


class BridgeConfig(Struct, frozen=True, kw_only=True):
    """The configuration of the bridge process. ``kinds``: those of the server's devices, as in profiles.

    ``shared``: controllers on other machines may lead, too.
    """

    run_dir: str
    settings: Settings
    kinds: tuple[str, ...]
    shared: bool = False


def cluster_files(settings: Settings) -> ClusterFiles:
    """The certificate and key of this machine, and the authority of all machines."""
    return ClusterFiles(
        certificate=settings.cluster_certificate, key=settings.cluster_key, ca=settings.cluster_ca,
        name=settings.cluster_name,
    )  # fmt: skip


def check_listening(settings: Settings) -> None:
    """Raise :class:`ConfigError` if a file or the port for other machines cannot be used."""
    cluster_files(settings).check("listen_machines")
    host, port = split_address(settings.listen_machines)
    try:
        bound(host, port).close()
    except OSError as error:
        raise ConfigError(
            f"listen_machines: expected an address of this machine and a free port; found {host}:{port}, not "
            f"to be had ({error.strerror or error}); choose another"
        ) from None


def check_joining(settings: Settings, joining: str) -> None:
    """Raise :class:`ConfigError` if a setting is missing that ``joining``, such as "a worker", needs."""
    if not settings.controller:
        raise ConfigError(
            "controller: expected HOST:PORT of a server that was started with --listen-machines; found none; "
            "give it with --controller"
        )
    cluster_files(settings).check(f"{joining} on another machine")


def check_store(settings: Settings) -> None:
    """Raise :class:`ConfigError` if a worker on another machine has nowhere to take models from.

    A folder that is not there may be mounted later; a URL that no library reaches stays so.
    """
    if not settings.store:
        raise ConfigError(
            "store: expected the shared store of the server, from which a worker on another machine takes "
            "models (a folder that both see, s3://..., http://...); found none; give the same to "
            "clockwork serve and to clockwork worker with --store"
        )
    if "://" in settings.store:
        from clockwork_serve.store import ProblemError  # imports ONNX and its runtime: 0.2 s of CPU
        from clockwork_serve.store.shared import files_of

        try:
            files_of(settings.store)
        except ProblemError as error:
            raise ConfigError(str(error.problem)) from None


def runtime() -> dict[str, str]:
    """What the artefacts of this machine depend on beside their models, and how they are laid out."""
    from clockwork_serve.store import runtime_fingerprint  # imports ONNX and its runtime: 0.2 s of CPU
    from clockwork_serve.store.cache import LAYOUT

    return {**runtime_fingerprint(), "layout": f"{LAYOUT}"}


BACKLOG: Final = 1024
"""Connections that wait to be accepted; a client of who comes then tries again after a second."""


def bound(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)
