"""BentoML: a service with an API per model, which learns how long batches take."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

import numpy as np

from comparison.peers.peer import Answer, Floats, Peer, Request, Setup


class BentoMl(Peer):
    """It takes JSON or forms from outside; its batches are of JSON."""

    name = "bentoml"
    package = "bentoml"
    configured = "adaptive batches of up to 8, `max_latency_ms` = SLO"
    source = "https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html"
    ready_path = "/readyz"

    def command(self, setup: Setup) -> Sequence[str]:
        """One worker process, which has all models."""
        return [
            self.python, "-m", "bentoml", "serve", "comparison.peers.bentoml.app:Models",
            "--host", "127.0.0.1", "--port", str(setup.port),
        ]  # fmt: skip

    def environment(self, setup: Setup) -> dict[str, str]:
        """Without what it would write and send beside its work."""
        return {
            **super().environment(setup), "BENTOML_HOME": str(setup.folder / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "True",
        }  # fmt: skip

    def request(self, setup: Setup, x: Floats) -> Request:
        """Base64 in JSON."""
        body = json.dumps({"x": [base64.b64encode(x.tobytes()).decode()]}).encode()
        return Request("/{model}", (("Content-Type", "application/json"),), body)

    def output(self, answer: Answer) -> Floats:
        """Base64 in JSON."""
        return np.frombuffer(base64.b64decode(json.loads(answer.body)[0]), np.float32)


PEER = BentoMl()
