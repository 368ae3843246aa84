"""An API per model."""

# Annotations are read while it runs: they must not be put off.

from typing import Any

import litserve
import numpy as np
from fastapi import Request, Response

from comparison.peers import served


class Model(litserve.LitAPI):
    """One model."""

    def setup(self, device: str) -> None:
        """In its worker."""
        self._run = served.load(self.api_path.strip("/"))

    def decode_request(self, request: Request) -> Any:
        """A form with one file."""
        return served.array(request["x"].file.read())

    def batch(self, inputs: list[Any]) -> Any:
        """Rows together."""
        return np.concatenate(inputs) if len(inputs) > 1 else inputs[0]

    def predict(self, x: Any) -> Any:
        """A batch."""
        return self._run(x)

    def unbatch(self, output: Any) -> list[Any]:
        """Rows apart."""
        return list(output)

    def encode_response(self, output: Any) -> Response:
        """One row."""
        return Response(content=output.tobytes(), media_type="application/octet-stream")


def main() -> None:
    """Serve all models, each under its name."""
    plan = served.plan()
    apis = [
        Model(max_batch_size=plan["batch"], batch_timeout=0.001, api_path=f"/{name}")
        for name in served.names()
    ]
    server = litserve.LitServer(apis, accelerator="cpu", workers_per_device=1, timeout=plan["slo_ms"] / 1e3)
    server.run(
        host="127.0.0.1", port=plan["port"], num_api_servers=1, generate_client_file=False,
        log_level="warning", access_log=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
