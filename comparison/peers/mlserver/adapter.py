"""MLServer with a runtime of ours, over gRPC, as its REST API accepts JSON only."""

from __future__ import annotations

import json
from collections.abc import Sequence

from comparison.peers import v2
from comparison.peers.peer import Answer, Floats, Peer, Request, Setup


class MlServer(Peer):
    """Batches, but neither deadline nor limit."""

    name = "mlserver"
    package = "mlserver"
    configured = (
        "batches of 8 (`max_batch_size`, `max_batch_time` 1 ms), one process; it has no deadline and no limit"
    )
    source = "https://docs.seldon.ai/mlserver/user-guide/adaptive-batching"
    protocol = "grpc"
    loads_by_call = True
    ready_path = "/v2/health/ready"

    def command(self, setup: Setup) -> Sequence[str]:
        """Settings in files, as it wants them."""
        settings = {
            "host": "127.0.0.1", "http_port": setup.port, "grpc_port": setup.port + 1,
            "metrics_port": setup.port + 2, "metrics_endpoint": None, "parallel_workers": 0, "debug": False,
            "grpc_max_message_length": 64 << 20, "use_structured_logging": False,
        }  # fmt: skip
        repository = setup.folder / "repository"
        repository.mkdir()
        (repository / "settings.json").write_text(json.dumps(settings))
        for name in setup.names:
            (repository / name).mkdir()
            model = {
                "name": name, "implementation": "comparison.peers.mlserver.app.Model",
                "max_batch_size": setup.batch, "max_batch_time": 0.001,
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, *setup.shape]}],
                "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, *setup.out]}],
            }  # fmt: skip
            (repository / name / "model-settings.json").write_text(json.dumps(model))
        return [str(self.home / "bin" / "mlserver"), "start", str(repository)]

    def request(self, setup: Setup, x: Floats) -> Request:
        """Raw tensors."""
        return v2.grpc_request(setup.names, x)

    def output(self, answer: Answer) -> Floats:
        """Raw, or not."""
        return v2.grpc_output(answer)


PEER = MlServer()
