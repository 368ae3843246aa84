"""A model of KServe per model."""

from __future__ import annotations

import argparse
from typing import Any

import kserve
from kserve import InferOutput, InferRequest, InferResponse

from comparison.peers import served


class Model(kserve.Model):
    """One model."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._run = served.load(name)
        self.ready = True

    async def get_input_types(self) -> list[dict[str, Any]]:
        """For clients that ask."""
        return [{"name": "x", "datatype": "FP32", "shape": [-1, *served.shape()]}]

    async def get_output_types(self) -> list[dict[str, Any]]:
        """For clients that ask."""
        return [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]

    async def predict(
        self, payload: InferRequest, headers: Any = None, response_headers: Any = None
    ) -> InferResponse:
        """In a thread, so that others are listened to meanwhile."""
        import asyncio

        x = payload.inputs[0].as_numpy()
        found = await asyncio.get_running_loop().run_in_executor(None, self._run, x)
        output = InferOutput(name="y", shape=list(found.shape), datatype="FP32")
        output.set_data_from_numpy(found, binary_data=True)
        return InferResponse(response_id=payload.id, model_name=self.name, infer_outputs=[output])


def main() -> None:
    """Serve all models."""
    parser = argparse.ArgumentParser(parents=[kserve.model_server.parser])
    given, _ = parser.parse_known_args()
    kserve.ModelServer(
        http_port=given.http_port, grpc_port=given.grpc_port, workers=1, enable_docs_url=False,
        access_log_format=None,
    ).start([Model(name) for name in served.names()])  # fmt: skip


if __name__ == "__main__":
    main()
