"""A collector of traces for tests and benchmarks, in this process or as one of its own.

``python -m harness.collector FILE`` prints its URL, and when its input ends it writes what it got to FILE, a
JSON line for each span.
"""

from __future__ import annotations

import gzip
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.trace.v1 import trace_pb2


class Collector(http.server.ThreadingHTTPServer):
    """Takes spans, or answers with another ``status``; says that it ``refused`` so many of each message."""

    daemon_threads = True

    def __init__(self, status: int = 200, refused: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.refused = status, refused
        self.spans: list[trace_pb2.Span] = []
        self.heads: list[dict[str, str]] = []
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        """Its base."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        """Take a message."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        collector = self.server
        collector.paths.append(self.path)
        collector.heads.append(dict(self.headers.items()))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        told = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
        if collector.status == http.HTTPStatus.OK:
            for resource in told.resource_spans:
                for scope in resource.scope_spans:
                    collector.spans.extend(scope.spans)
        answer = trace_service_pb2.ExportTraceServiceResponse()
        answer.partial_success.rejected_spans = collector.refused
        text = answer.SerializeToString()
        self.send_response(collector.status)
        if 300 <= collector.status < 400:
            self.send_header("Location", "http://127.0.0.1:1/v1/traces")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def collecting(status: int = 200, refused: int = 0) -> Iterator[Collector]:
    """A collector in a thread of this process."""
    collector = Collector(status, refused)
    thread = threading.Thread(target=collector.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        collector.shutdown()
        collector.server_close()
        thread.join()


def written(span: trace_pb2.Span) -> str:
    """A span as a line of JSON; ids in hexadecimal."""
    attributes = {
        each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value")
        for each in span.attributes
    }
    return json.dumps(
        {
            "trace": span.trace_id.hex(), "span": span.span_id.hex(), "parent": span.parent_span_id.hex(),
            "name": span.name, "start_ns": span.start_time_unix_nano, "end_ns": span.end_time_unix_nano,
            "error": span.status.message if span.status.code == 2 else "", "attributes": attributes,
            "links": [link.span_id.hex() for link in span.links], "state": span.trace_state,
        }
    )  # fmt: skip


def main() -> None:
    """Collect until the input ends."""
    with collecting() as collector:
        print(collector.url, flush=True)
        sys.stdin.read()
    Path(sys.argv[1]).write_text("".join(f"{written(span)}\n" for span in collector.spans))


if __name__ == "__main__":
    main()
