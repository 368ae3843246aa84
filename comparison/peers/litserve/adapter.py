"""LitServe: FastAPI in front, a worker process per model behind queues."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from comparison.peers.peer import Answer, Floats, Peer, Request, Setup

# ------------------------------------------------------------
# Multipart forms, for servers that take no other bytes.


_BOUNDARY = "a-boundary-that-no-tensor-holds-7d1f0c9ab2"


def form(field: str, data: bytes) -> tuple[str, bytes]:
    """Content type and body of a form with one file."""
    head = (
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{field}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return f"multipart/form-data; boundary={_BOUNDARY}", b"".join(
        (head.encode(), data, f"\r\n--{_BOUNDARY}--\r\n".encode())
    )


class LitServe(Peer):
    """It takes JSON or forms; a form with a file is the cheaper."""

    name = "litserve"
    package = "litserve"
    configured = "batches of 8, timeout = SLO (seen when a worker takes a request from its queue)"
    source = "https://lightning.ai/docs/litserve/features/batching"
    per_model = True
    ready_path = "/health"

    def command(self, setup: Setup) -> Sequence[str]:
        """A program of its own kind."""
        return [self.python, "-m", "comparison.peers.litserve.app"]

    def request(self, setup: Setup, x: Floats) -> Request:
        """A form with one file."""
        content_type, body = form("x", x.tobytes())
        return Request("/{model}", (("Content-Type", content_type),), body)

    def output(self, answer: Answer) -> Floats:
        """Bytes."""
        return np.frombuffer(answer.body, np.float32)


PEER = LitServe()
