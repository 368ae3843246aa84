"""KServe's Python server, over gRPC: its path for binary tensors over HTTP makes lists of them."""

from __future__ import annotations

from collections.abc import Sequence

from comparison.peers import v2
from comparison.peers.peer import Answer, Floats, Peer, Request, Setup


class KServe(Peer):
    """No batches, no deadline, no limit: batches are made by a sidecar that is not in the package."""

    name = "kserve"
    package = "kserve"
    configured = "no deadline, no batches, no limit: the Python server has none"
    source = (
        "https://kserve.github.io/website/docs/model-serving/predictive-inference/frameworks/custom-predictor"
    )
    protocol = "grpc"
    binds_all = True
    ready_path = "/v2/health/ready"

    def command(self, setup: Setup) -> Sequence[str]:
        """A program of its own kind."""
        return [
            self.python, "-m", "comparison.peers.kserve.app", "--http_port", str(setup.port),
            "--grpc_port", str(setup.port + 1), "--workers", "1", "--enable_docs_url", "False",
        ]  # fmt: skip

    def request(self, setup: Setup, x: Floats) -> Request:
        """Raw tensors."""
        return v2.grpc_request(setup.names, x)

    def output(self, answer: Answer) -> Floats:
        """Raw, or not."""
        return v2.grpc_output(answer)


PEER = KServe()
