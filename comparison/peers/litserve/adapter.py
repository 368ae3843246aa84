"""LitServe: FastAPI in front, a worker process per model behind queues."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from comparison.peers.forms import form
from comparison.peers.peer import Answer, Floats, Peer, Request, Setup


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
