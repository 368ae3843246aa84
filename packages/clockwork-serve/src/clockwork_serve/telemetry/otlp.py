"""Spans to a collector, by OTLP over HTTP: a thread of its own, which nothing waits for.

The format is protobuf, of which only the messages and fields that are used are described here, by the names
and numbers of OpenTelemetry's (``opentelemetry/proto/trace/v1``).
"""

from __future__ import annotations

import gzip
import http.client
import logging
import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from msgspec import Struct

import clockwork_serve
from clockwork_serve.errors import ConfigError, described, printable
from clockwork_serve.telemetry.in_flight import Told
from clockwork_serve.telemetry.spans import Span
from clockwork_serve.units import KIB

# ------------------------------------------------------------
# Spans as a message.


_SCHEMA: Final = {
    "ExportTraceServiceRequest": "resource_spans=1:ResourceSpans*",
    "ResourceSpans": "resource=1:Resource scope_spans=2:ScopeSpans*",
    "Resource": "attributes=1:KeyValue*",
    "ScopeSpans": "scope=1:Scope spans=2:OtlpSpan*",
    "Scope": "name=1:string version=2:string",
    "OtlpSpan": """
        trace_id=1:bytes span_id=2:bytes trace_state=3:string parent_span_id=4:bytes name=5:string
        kind=6:int32
        start_time_unix_nano=7:fixed64 end_time_unix_nano=8:fixed64 attributes=9:KeyValue* links=13:Link*
        status=15:SpanStatus""",
    "Link": "trace_id=1:bytes span_id=2:bytes",
    "SpanStatus": "message=2:string code=3:int32",
    "KeyValue": "key=1:string value=2:AnyValue",
    "AnyValue": "string_value=1:string bool_value=2:bool int_value=3:int64 double_value=4:double",
    "ExportTraceServiceResponse": "partial_success=1:PartialSuccess",
    "PartialSuccess": "rejected_spans=1:int64 error_message=2:string",
}
_TYPES: Final = {"double": 1, "int64": 3, "int32": 5, "fixed64": 6, "bool": 8, "string": 9, "bytes": 12}
_INT64_MAX: Final = (1 << 63) - 1
_INTERNAL, _SERVER, _FAILED = 1, 2, 2
SERVICE: Final = "clockwork"
_messages: dict[str, Any] = {}


def message(name: str) -> Any:
    """The class of a message of OTLP; made when it is first used."""
    if not _messages:
        _messages.update(_message_classes(_SCHEMA))
    return _messages[name]


def _message_classes(schema: Mapping[str, str]) -> dict[str, Any]:
    """The messages of a schema, in a pool of their own: another library may define the same names.

    Of each message it has the fields that are used: ``name=number:type``, with ``*`` where it is repeated.
    """
    file = descriptor_pb2.FileDescriptorProto(name="used.proto", package="used")
    for message, fields in schema.items():
        described: Any = file.message_type.add(name=message)
        for text in fields.split():
            name, _, rest = text.partition("=")
            number, _, kind = rest.rstrip("*").partition(":")
            field = described.field.add(name=name, number=int(number), label=3 if rest[-1] == "*" else 1)
            field.type = _TYPES.get(kind, 11)
            if kind in schema:
                field.type_name = f".used.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"used.{name}")) for name in schema
    }


def encode_spans(spans: Sequence[Span], service: str = SERVICE) -> bytes:
    """An ``ExportTraceServiceRequest`` with these spans. Foreign text is made printable."""
    made = message("ExportTraceServiceRequest")()
    group = made.resource_spans.add()
    _set(group.resource.attributes, {"service.name": service, "service.version": clockwork_serve.__version__})
    scope = group.scope_spans.add()
    scope.scope.name = "clockwork_serve"
    for span in spans:
        root = span.name == "clockwork.request"
        told = scope.spans.add(
            trace_id=span.trace_id, span_id=span.span_id, trace_state=span.state,
            parent_span_id=span.parent_id, name=span.name, kind=_SERVER if root else _INTERNAL,
            start_time_unix_nano=max(span.start_ns, 0), end_time_unix_nano=max(span.end_ns, 0),
        )  # fmt: skip
        _set(told.attributes, span.attributes)
        for trace_id, span_id in span.links:
            told.links.add(trace_id=trace_id, span_id=span_id)
        if span.error:
            told.status.code, told.status.message = _FAILED, printable(span.error)
    encoded: bytes = made.SerializeToString()
    return encoded


def _set(attributes: Any, told: Told) -> None:
    for key, value in told.items():
        found = attributes.add(key=key).value
        if isinstance(value, str):
            found.string_value = printable(value)
        elif isinstance(value, bool):
            found.bool_value = value
        elif isinstance(value, int):
            found.int_value = min(max(value, -_INT64_MAX), _INT64_MAX)
        else:
            found.double_value = value


# ------------------------------------------------------------
# Where to: an endpoint, and what OpenTelemetry's environment variables say beside it.


class OtlpTarget(Struct, frozen=True, kw_only=True):
    """A collector. ``timeout_s`` is for one message, from the first byte of its connection to the last."""

    url: str
    headers: dict[str, str] = {}
    timeout_s: float = 10.0
    gzip: bool = False
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    service: str = SERVICE


def otlp_target(endpoint: str, environment: Mapping[str, str]) -> OtlpTarget:
    """The collector at ``endpoint``, with what the environment says of it.

    ``OTEL_EXPORTER_OTLP_*`` and ``OTEL_EXPORTER_OTLP_TRACES_*``, which goes first, are read as OpenTelemetry
    specifies them; ``OTEL_SERVICE_NAME`` too. Raises :class:`ConfigError` for what cannot be used.
    """

    def variable(name: str) -> str:
        of_traces = environment.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}", "").strip()
        return of_traces or environment.get(f"OTEL_EXPORTER_OTLP_{name}", "").strip()

    base = endpoint.rstrip("/")
    url = base if base.endswith("/v1/traces") else f"{base}/v1/traces"
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not (known and url.isascii() and url.isprintable() and " " not in url):
        raise ConfigError(
            f"otlp_endpoint: expected http://HOST:PORT or https://HOST:PORT of a collector, found {url!r}"
        )
    headers = {}
    for part in filter(None, variable("HEADERS").split(",")):
        name, _, value = (unquote(piece.strip()) for piece in part.partition("="))
        if not name or not f"{name}{value}".isprintable() or not f"{name}{value}".isascii():
            raise ConfigError("OTEL_EXPORTER_OTLP_HEADERS: expected NAME=VALUE,NAME=VALUE, found other text")
        headers[name] = value
    timeout = variable("TIMEOUT") or "10000"
    if not timeout.isdecimal() or not 0 < int(timeout) <= 600_000:
        raise ConfigError(f"OTEL_EXPORTER_OTLP_TIMEOUT: expected milliseconds, found {timeout!r}")
    return OtlpTarget(
        url=url, headers=headers, timeout_s=int(timeout) / 1000, gzip=variable("COMPRESSION") == "gzip",
        ca=variable("CERTIFICATE") or None, certificate=variable("CLIENT_CERTIFICATE") or None,
        key=variable("CLIENT_KEY") or None, service=environment.get("OTEL_SERVICE_NAME", "") or SERVICE,
    )  # fmt: skip


# ------------------------------------------------------------
# One message to a collector, which may be down, slow or hostile.


ANSWER_BYTES: Final = 64 * KIB
_AGAIN: Final = frozenset({429, 502, 503, 504})
"""What OTLP says may be sent again; a redirect is not followed."""


class ExportFailed(Exception):
    """A message was not taken; ``again``: it may be sent again later."""

    def __init__(self, why: str, *, again: bool) -> None:
        super().__init__(why)
        self.again = again


def export(target: OtlpTarget, body: bytes) -> int:
    """Send one message; how many of its spans the collector refused. Raises :class:`ExportFailed`.

    After ``target.timeout_s`` the connection is closed, however the collector spends the time.
    """
    parts = urlsplit(target.url)
    headers = {"Content-Type": "application/x-protobuf", "User-Agent": "clockwork-serve", **target.headers}
    if target.gzip:
        body, headers["Content-Encoding"] = gzip.compress(body, 1), "gzip"
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    try:
        with _connected(target, parts.hostname or "", parts.port) as connection:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            told = answer.read(ANSWER_BYTES) if answer.status == http.client.OK else b""
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ExportFailed(described(error, 200), again=True) from None
    if answer.status != http.client.OK:
        raise ExportFailed(f"it answered {answer.status}", again=answer.status in _AGAIN)
    return _refused(told)


def _refused(told: bytes) -> int:
    """How many spans a collector says it refused; what it says in other words is taken for none."""
    with suppress(Exception):  # whatever a parser raises
        found: int = message("ExportTraceServiceResponse").FromString(told).partial_success.rejected_spans
        return max(0, found)
    return 0


@contextmanager
def _connected(target: OtlpTarget, host: str, port: int | None) -> Iterator[http.client.HTTPConnection]:
    """A connection that is closed after the time limit, in whatever it is then.

    A time limit of a socket is for each read alone: who sends a byte a second would never exceed it.
    """
    secure = target.url.startswith("https:")
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    context = _trust(target) if secure else None
    connection = kind(host, port)
    sock = socket.create_connection((host, connection.port), target.timeout_s)
    handle = sock.dup()  # the handshake of TLS takes the first one over
    watch = threading.Timer(target.timeout_s, _cut, (handle,))
    watch.daemon = True
    watch.start()
    try:
        with sock, handle:
            connection.sock = sock if context is None else context.wrap_socket(sock, server_hostname=host)
            yield connection
    finally:
        watch.cancel()
        connection.close()


def _cut(handle: socket.socket) -> None:
    with suppress(OSError):
        handle.shutdown(socket.SHUT_RDWR)


def _trust(target: OtlpTarget) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=target.ca)
        if target.certificate:
            context.load_cert_chain(target.certificate, target.key)
    except OSError as error:
        why = f"the files of certificates cannot be used: {described(error, 200)}"
        raise ExportFailed(why, again=False) from None
    return context


# ------------------------------------------------------------
# The queue before it.


QUEUE_SPANS: Final = 20_000  # about 20 MB. What comes while it is full is dropped, and counted
MESSAGE_SPANS: Final = 512
COLLECT_S: Final = 1.0
RETRIES: Final = 4
FIRST_PAUSE_S: Final = 1.0
_log = logging.getLogger(__name__)


class OtlpExporter:
    """Sends spans from a thread of its own. ``offer`` never waits.

    ``sent`` were taken by the collector, ``dropped`` found the queue full, ``failed`` were refused by the
    collector, or could not be sent in ``RETRIES`` more attempts, with a pause that doubles.
    """

    def __init__(self, target: OtlpTarget, *, pause_s: float = FIRST_PAUSE_S) -> None:
        self.sent = self.dropped = self.failed = 0
        self.why = ""  # the last attempt failed; empty if it did not
        self._target, self._pause_s = target, pause_s
        self._queue: queue.SimpleQueue[list[Span] | None] = queue.SimpleQueue()
        self._queued = 0  # spans; written by both threads under _lock
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._thread.start()

    def offer(self, spans: list[Span]) -> None:
        """Send these soon, or drop them all."""
        with self._lock:
            full = self._queued + len(spans) > QUEUE_SPANS
            self._queued += 0 if full else len(spans)
        if full:
            self.dropped += len(spans)
        else:
            self._queue.put(spans)

    def close(self, limit_s: float = 5.0) -> None:
        """Send what is left, with no attempt after a failed one; after that time it counts as failed."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join(limit_s)
        with self._lock:
            self.failed += self._queued
            self._queued = 0

    def _run(self) -> None:
        while True:
            spans = self._queue.get()
            if spans is None:
                return
            over = self._collect(spans)
            try:
                sent = self._send(spans)
            except Exception:  # noqa: BLE001 - a bug that some spans trigger must not end all others
                _log.exception("spans could not be sent")
                sent = 0
            with self._lock:
                if self._queued:  # else they were given up meanwhile, and counted
                    self._queued -= len(spans)
                    self.sent += sent
                    self.failed += len(spans) - sent
            if over:
                return

    def _collect(self, spans: list[Span]) -> bool:
        """Wait a moment for more, as many as fit in a message; whether it is to end."""
        end_s = time.monotonic() + COLLECT_S
        while len(spans) < MESSAGE_SPANS:
            left_s = 0.0 if self._closing.is_set() else max(0.0, end_s - time.monotonic())
            try:
                more = self._queue.get(timeout=left_s) if left_s else self._queue.get_nowait()
            except queue.Empty:
                return False
            if more is None:
                return True
            spans += more
        return False

    def _send(self, spans: list[Span]) -> int:
        """How many of these the collector took."""
        body, pause_s = encode_spans(spans, self._target.service), self._pause_s
        for attempt in range(1 + RETRIES):
            try:
                refused = min(export(self._target, body), len(spans))
            except ExportFailed as error:
                if not self.why:
                    _log.warning("traces: %s takes no spans: %s", self._target.url, error)
                self.why = str(error)
                if not error.again or attempt == RETRIES or self._closing.wait(pause_s):
                    break
                pause_s *= 2
            else:
                self.why = ""
                return len(spans) - refused
        return 0
