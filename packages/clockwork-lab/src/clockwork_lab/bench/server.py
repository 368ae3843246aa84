"""What is asked of a server before any load: whether it is there, which models it has, what they take."""

from __future__ import annotations

import http.client
import re
import socket
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import quote

import msgspec

from clockwork_lab.bench.address import Address, TlsFiles, Unreachable
from clockwork_lab.bench.inputs import TensorInfo
from clockwork_serve.errors import ConfigError
from clockwork_serve.oip.protobuf import message
from clockwork_serve.workload.tables import did_you_mean
from clockwork_serve.workload.traces import counted

WAIT_S: Final = 10.0
OBJECTIONS_S: Final = 0.25
NO_FILES: Final = TlsFiles()
_SHOWN: Final = 8
_NUMBERED: Final = re.compile(r"(?P<set>.*)-(?P<number>\d+)")
_UNKNOWN_SIGNERS: Final = (18, 19, 20, 21)
"""OpenSSL's numbers for certificates whose signer is itself, or not known."""
_METADATA: Final = "/inference.GRPCInferenceService/ModelMetadata"


class Metadata(msgspec.Struct):
    """Of a model, as far as it matters here."""

    inputs: list[TensorInfo]


class Server(Protocol):
    """A server that can be asked about its models."""

    def inputs(self, model: str) -> list[TensorInfo] | None:
        """What a model takes; None if the server does not know it. Raises :class:`Unreachable`."""

    def close(self) -> None:
        """End the connection."""


def reached(address: Address, tls: ssl.SSLContext | None) -> str:
    """The IP address of the server, which takes connections there. Raises :class:`Unreachable`.

    With ``tls`` it shows a certificate that is trusted.
    """
    try:
        places = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unreachable(f"url: expected a server at {address}, found none: {error.strerror}") from None
    said = ""
    for family, kind, _, _, place in places:
        with socket.socket(family, kind) as probe:
            probe.settimeout(WAIT_S)
            try:
                probe.connect(place)
            except OSError as error:
                said = error.strerror or str(error)
            else:
                if tls is not None:
                    _shake_hands(probe, address, tls)
                return str(place[0])
    raise Unreachable(f"url: expected a server at {address}, found none: {said}; is it running?")


def _shake_hands(probe: socket.socket, address: Address, tls: ssl.SSLContext) -> None:
    try:
        with tls.wrap_socket(probe, server_hostname=address.host) as secure:
            _hear_objections(secure, address)
    except ssl.SSLCertVerificationError as error:
        hint = "; name who signed it: --ca FILE" if error.verify_code in _UNKNOWN_SIGNERS else ""
        said = f"{error.verify_message}{hint}"
        raise Unreachable(
            f"url: expected a certificate to trust from {address}, found another: {said}"
        ) from None
    except OSError as error:
        said = getattr(error, "reason", None) or error.strerror or str(error)
        raise Unreachable(
            f"url: expected TLS at {address}, found other bytes or none ({said}); is it spoken there?"
        ) from None


def _hear_objections(secure: ssl.SSLSocket, address: Address) -> None:
    """A server says after its part of the handshake what it thinks of ours."""
    secure.settimeout(OBJECTIONS_S)
    said = ""
    try:
        if secure.recv(1):
            return  # HTTP/2 begins with the server's settings
    except TimeoutError:
        return
    except ssl.SSLError as error:
        said = f" ({error.reason})"
    raise Unreachable(
        f"url: expected a connection over TLS to {address}, found that it ends it at once{said}; "
        "if it asks for a certificate, show one that it knows: --cert FILE --key FILE"
    )


def _credentials(grpc: Any, tls: ssl.SSLContext, files: TlsFiles) -> Any:
    cert = None if files.cert is None else Path(files.cert).read_bytes()
    key = cert if files.key is None else Path(files.key).read_bytes()
    return grpc.ssl_channel_credentials(_roots(tls, files.ca), key, cert)


def _roots(tls: ssl.SSLContext, ca: str | None) -> bytes:
    """Certificates that were trusted when hands were shaken, as gRPC wants them: it has others of its own."""
    if ca is not None:
        return Path(ca).read_bytes()
    return "".join(map(ssl.DER_cert_to_PEM_cert, tls.get_ca_certs(binary_form=True))).encode()


class HttpServer:
    """Over HTTP."""

    def __init__(
        self, address: Address, headers: Sequence[tuple[str, str]], tls: ssl.SSLContext | None
    ) -> None:
        self._address, self._headers = address, dict(headers)
        if tls is None:
            self._connection = http.client.HTTPConnection(address.host, address.port, timeout=WAIT_S)
        else:
            self._connection = http.client.HTTPSConnection(
                address.host, address.port, timeout=WAIT_S, context=tls
            )

    def inputs(self, model: str) -> list[TensorInfo] | None:
        """From its metadata."""
        path = f"{self._address.base}/v2/models/{quote(model, safe='')}"
        try:
            self._connection.request("GET", path, headers=self._headers)
            response = self._connection.getresponse()
            status, content = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            said = (str(error) if isinstance(error, OSError) else "") or "other bytes"
            hint = "" if self._address.tls else "; if it speaks TLS, write https://"
            raise Unreachable(f"url: expected HTTP at {self._address}, found {said}{hint}") from None
        if status == 200:
            return _read(self._address, model, content)
        said = content[:200].decode(errors="replace").strip()
        if status in (401, 403):
            raise Unreachable(f"url: {self._address} answers {status}: {said}; give --api-key-file")
        if status in (400, 404):
            return None
        raise Unreachable(
            f"url: expected metadata of model {model!r} at {self._address}{path}, found {status}: {said}"
        )

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


class GrpcServer:
    """Over gRPC."""

    def __init__(
        self,
        address: Address,
        headers: Sequence[tuple[str, str]],
        tls: ssl.SSLContext | None,
        files: TlsFiles = NO_FILES,
    ) -> None:
        import grpc

        self._grpc: Any = grpc
        self._address = address
        self._metadata = [(name.lower(), value) for name, value in headers]
        if tls is None:
            self._channel = grpc.insecure_channel(address.name)
        else:
            self._channel = grpc.secure_channel(address.name, _credentials(grpc, tls, files))
        self._ask = self._channel.unary_unary(
            _METADATA,
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=message("inference.ModelMetadataResponse").FromString,
        )
        self._request = message("inference.ModelMetadataRequest")

    def inputs(self, model: str) -> list[TensorInfo] | None:
        """From its metadata."""
        code = self._grpc.StatusCode
        try:
            found = self._ask(self._request(name=model), timeout=WAIT_S, metadata=self._metadata)
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
        """End the connection."""
        self._channel.close()


def names_at_server(
    models: Sequence[str], instead: Sequence[str], renamed: Mapping[str, str]
) -> dict[str, str]:
    """The server's name of each of the scenario's models.

    ``instead`` are the server's models, in turn. ``renamed``: a model's name, or a set's, by the server's, in
    which ``{i}`` stands for the number of a copy. Raises :class:`ConfigError` for a name that is none.
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


def inputs_of(server: Server, names: Mapping[str, str], address: Address) -> dict[str, list[TensorInfo]]:
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


def _read(address: Address, model: str, content: bytes) -> list[TensorInfo]:
    try:
        return msgspec.json.decode(content, type=Metadata).inputs
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Unreachable(
            f"url: expected metadata of model {model!r} in the Open Inference Protocol from {address}, found "
            f"other content ({error}); for a server with an API of its own, use --protocol raw"
        ) from None
