"""A server before the load: its address, whether it can be reached, which models it has, and their inputs."""

from __future__ import annotations

import http.client
import re
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote, urlsplit

import msgspec
from msgspec import Struct

from clockwork_serve.errors import ClockworkError, ConfigError, did_you_mean
from clockwork_serve.oip.protobuf import message
from clockwork_serve.units import counted

Protocol = Literal["http", "grpc", "raw"]
PROTOCOLS: Final = ("http", "grpc", "raw")
_SCHEMES: Final = {
    "http": {"http": False, "https": True},
    "raw": {"http": False, "https": True},
    "grpc": {"http": False, "https": True, "grpc": False, "grpcs": True},
}
_PORTS: Final = {"http": 80, "https": 443}


class Unreachable(ClockworkError):
    """No server responds at the address, or it does not implement the protocol."""


@dataclass(slots=True, frozen=True)
class ServerAddress:
    """Host and port, whether to use TLS, and the prefix of every path."""

    host: str
    port: int
    tls: bool
    base: str

    @classmethod
    def of(cls, url: str, protocol: Protocol) -> ServerAddress:
        """From ``http://HOST:PORT/BASE`` or ``HOST:PORT``. Raises :class:`ConfigError`."""
        schemes = _SCHEMES[protocol]
        try:
            parts = urlsplit(url if "://" in url else f"{next(iter(schemes))}://{url}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
            parts = urlsplit("")
        if port is None:
            port = _PORTS.get(parts.scheme) if "://" in url and protocol != "grpc" else None
        if not host or not port or parts.scheme not in schemes or parts.query or parts.fragment:
            wanted = " or ".join(f"{scheme}://HOST:PORT" for scheme in schemes)
            raise ConfigError(f"url: expected {wanted}, found {url!r}; correct it")
        return cls(host, port, schemes[parts.scheme], parts.path.rstrip("/"))

    @property
    def name(self) -> str:
        """``HOST:PORT`` as headers write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.name}{self.base}"


class ClientTlsFiles(Struct, frozen=True):
    """PEM files: the authorities to trust (None: the system's), and the client certificate.

    ``key`` may be in the file of ``cert``; it has no passphrase.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None


def tls_context(files: ClientTlsFiles, *, http2: bool) -> ssl.SSLContext:
    """The context for TLS connections. Raises :class:`ConfigError`."""
    try:
        context = ssl.create_default_context(cafile=files.ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"ca: expected a file of certificates in PEM, found {files.ca} ({error})") from None
    if files.cert is not None:
        try:
            context.load_cert_chain(files.cert, files.key, password=lambda: "")
        except (OSError, ssl.SSLError) as error:
            found = f"{files.cert} and {files.key or 'no --key'} ({error})"
            raise ConfigError(
                f"cert: expected a certificate and its key in PEM, without a passphrase, found {found}"
            ) from None
    context.set_alpn_protocols(["h2"] if http2 else ["http/1.1"])
    return context


# ------------------------------------------------------------
# Queries to a server before the load.


Shape = tuple[int, ...]
WAIT_S: Final = 10.0
REJECTION_S: Final = 0.25
_SHOWN: Final = 8
_NUMBERED: Final = re.compile(r"(?P<set>.*)-(?P<number>\d+)")
_UNKNOWN_SIGNERS: Final = (18, 19, 20, 21)
"""OpenSSL's numbers for certificates whose signer is itself, or not known."""
_METADATA: Final = "/inference.GRPCInferenceService/ModelMetadata"


class TensorInfo(Struct, frozen=True):
    """An input as a server describes it; -1 is any size."""

    name: str
    datatype: str
    shape: Shape


class Metadata(Struct):
    """The part of a model's metadata that is needed here."""

    inputs: list[TensorInfo]


def reached(address: ServerAddress, tls: ssl.SSLContext | None) -> str:
    """The IP address at which the server accepts connections. Raises :class:`Unreachable`.

    With ``tls`` its certificate is verified.
    """
    try:
        places = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unreachable(f"url: expected a server at {address}, found none: {error.strerror}") from None
    reason = ""
    for family, kind, _, _, place in places:
        with socket.socket(family, kind) as probe:
            probe.settimeout(WAIT_S)
            try:
                probe.connect(place)
            except OSError as error:
                reason = error.strerror or str(error)
            else:
                if tls is not None:
                    _handshake(probe, address, tls)
                return str(place[0])
    raise Unreachable(f"url: expected a server at {address}, found none: {reason}; is it running?")


def _handshake(probe: socket.socket, address: ServerAddress, tls: ssl.SSLContext) -> None:
    try:
        with tls.wrap_socket(probe, server_hostname=address.host) as secure:
            _check_accepted(secure, address)
    except ssl.SSLCertVerificationError as error:
        hint = "; name its authority: --ca FILE" if error.verify_code in _UNKNOWN_SIGNERS else ""
        reason = f"{error.verify_message}{hint}"
        raise Unreachable(
            f"url: expected a trusted certificate from {address}, found another: {reason}"
        ) from None
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or str(error)
        raise Unreachable(
            f"url: expected TLS at {address}, found other bytes or none ({reason}); does the server use TLS?"
        ) from None


def _check_accepted(secure: ssl.SSLSocket, address: ServerAddress) -> None:
    """Raise :class:`Unreachable` if the server rejects the TLS handshake after its own part of it."""
    secure.settimeout(REJECTION_S)
    reason = ""
    try:
        if secure.recv(1):
            return  # an HTTP/2 server sends its settings first
    except TimeoutError:
        return
    except ssl.SSLError as error:
        reason = f" ({error.reason})"
    raise Unreachable(
        f"url: expected a connection over TLS to {address}, found that the server closes it at once{reason}; "
        "if it requires a client certificate, give one: --cert FILE --key FILE"
    )


def _credentials(grpc: Any, tls: ssl.SSLContext, files: ClientTlsFiles) -> Any:
    cert = None if files.cert is None else Path(files.cert).read_bytes()
    key = cert if files.key is None else Path(files.key).read_bytes()
    return grpc.ssl_channel_credentials(_roots(tls, files.ca), key, cert)


def _roots(tls: ssl.SSLContext, ca: str | None) -> bytes:
    """The certificates that verified the handshake, for gRPC, which has its own defaults."""
    if ca is not None:
        return Path(ca).read_bytes()
    return "".join(map(ssl.DER_cert_to_PEM_cert, tls.get_ca_certs(binary_form=True))).encode()


class HttpMetadata:
    """A server queried over HTTP."""

    def __init__(
        self, address: ServerAddress, headers: Sequence[tuple[str, str]], tls: ssl.SSLContext | None
    ) -> None:
        self._address, self._headers = address, dict(headers)
        if tls is None:
            self._connection = http.client.HTTPConnection(address.host, address.port, timeout=WAIT_S)
        else:
            self._connection = http.client.HTTPSConnection(
                address.host, address.port, timeout=WAIT_S, context=tls
            )

    def inputs(self, model: str) -> list[TensorInfo] | None:
        """A model's inputs, from its metadata."""
        path = f"{self._address.base}/v2/models/{quote(model, safe='')}"
        try:
            self._connection.request("GET", path, headers=self._headers)
            response = self._connection.getresponse()
            status, content = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            reason = (str(error) if isinstance(error, OSError) else "") or "other bytes"
            hint = "" if self._address.tls else "; if it speaks TLS, write https://"
            raise Unreachable(f"url: expected HTTP at {self._address}, found {reason}{hint}") from None
        if status == 200:
            return _read(self._address, model, content)
        reason = content[:200].decode(errors="replace").strip()
        if status in (401, 403):
            raise Unreachable(f"url: {self._address} answers {status}: {reason}; give --api-key-file")
        if status in (400, 404):
            return None
        raise Unreachable(
            f"url: expected metadata of model {model!r} at {self._address}{path}, found {status}: {reason}"
        )

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class GrpcMetadata:
    """A server queried over gRPC."""

    def __init__(
        self, address: ServerAddress, headers: Sequence[tuple[str, str]], tls: ssl.SSLContext | None,
        files: ClientTlsFiles,
    ) -> None:  # fmt: skip
        import grpc

        self._grpc: Any = grpc
        self._address = address
        self._metadata = [(name.lower(), value) for name, value in headers]
        if tls is None:
            self._channel = grpc.insecure_channel(address.name)
        else:
            self._channel = grpc.secure_channel(address.name, _credentials(grpc, tls, files))
        self._call = self._channel.unary_unary(
            _METADATA,
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=message("inference.ModelMetadataResponse").FromString,
        )
        self._request = message("inference.ModelMetadataRequest")

    def inputs(self, model: str) -> list[TensorInfo] | None:
        """A model's inputs, from its metadata."""
        code = self._grpc.StatusCode
        try:
            found = self._call(self._request(name=model), timeout=WAIT_S, metadata=self._metadata)
        except self._grpc.RpcError as error:
            if error.code() in (code.NOT_FOUND, code.INVALID_ARGUMENT):
                return None
            hint = "; give --api-key-file" if error.code() is code.UNAUTHENTICATED else ""
            if error.code() is code.UNAVAILABLE and not self._address.tls:
                hint = "; if it speaks TLS, write grpcs://"
            raise Unreachable(
                f"url: expected metadata of model {model!r} from {self._address.name}, found "
                f"{error.code().name}: {error.details()}{hint}"
            ) from None
        return [TensorInfo(each.name, each.datatype, tuple(each.shape)) for each in found.inputs]

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


def names_at_server(
    models: Sequence[str], instead: Sequence[str], renamed: Mapping[str, str]
) -> dict[str, str]:
    """The server's name of each of the scenario's models.

    ``instead`` are the server's models, assigned in turn. ``renamed`` maps a model's or a set's name to the
    server's, in which ``{i}`` stands for the number of a copy. Raises :class:`ConfigError` for unknown names.
    """
    if instead:
        return {model: instead[at % len(instead)] for at, model in enumerate(models)}
    used: set[str] = set()
    found = {}
    for model in models:
        numbered = _NUMBERED.fullmatch(model)
        key = model if model in renamed or numbered is None else numbered["set"]
        used.add(key)
        name = renamed.get(key, model)
        found[model] = name.replace("{i}", str(int(numbered["number"]))) if numbered else name
    for key in renamed:
        if key not in used:
            known = {*models, *used}
            raise ConfigError(
                f"map: expected a model of the scenario before '=', found {key!r}; {did_you_mean(key, known)}"
            )
    return found


def inputs_of(
    server: HttpMetadata | GrpcMetadata, names: Mapping[str, str], address: ServerAddress
) -> dict[str, list[TensorInfo]]:
    """The inputs of each of the server's models. Raises :class:`ConfigError` naming those that it lacks."""
    found: dict[str, list[TensorInfo]] = {}
    missing: list[str] = []
    for name in dict.fromkeys(names.values()):
        inputs = server.inputs(name)
        if inputs is None:
            missing.append(name)
        else:
            found[name] = inputs
    if missing:
        shown = ", ".join(missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN:,} more" if len(missing) > _SHOWN else ""
        raise ConfigError(
            f"models: expected the scenario's {counted(len(found) + len(missing), 'model')} at {address}, "
            f"which does not have {shown}{more}; say which of its models stand for them: --models or --map"
        )
    return found


def _read(address: ServerAddress, model: str, content: bytes) -> list[TensorInfo]:
    try:
        return msgspec.json.decode(content, type=Metadata).inputs
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Unreachable(
            f"url: expected metadata of model {model!r} in the Open Inference Protocol from {address}, found "
            f"other content ({error}); for a server with an API of its own, use --protocol raw"
        ) from None
