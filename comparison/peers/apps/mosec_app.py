"""A worker per model; each batches its own requests."""

from __future__ import annotations

import os
from typing import Any

from mosec import Runtime, Server, Worker

from comparison.peers import served


class Model(Worker):
    """One model, whose name is in the environment of its process."""

    def __init__(self) -> None:
        super().__init__()
        self._run = served.load(os.environ["PEER_MODEL"])

    def deserialize(self, data: bytes) -> Any:
        """One row."""
        return served.array(data)

    def forward(self, data: list[Any]) -> list[Any]:
        """A batch."""
        import numpy as np

        found = self._run(np.concatenate(data) if len(data) > 1 else data[0])
        return [found[row : row + 1] for row in range(len(data))]

    def serialize(self, data: Any) -> bytes:
        """One row."""
        return bytes(data.tobytes())


def main() -> None:
    """Serve all models, each under its name."""
    plan = served.plan()
    server = Server()
    routes: dict[str, list[Runtime]] = {}
    for name in served.names():
        runtime = Runtime(
            Model, num=1, max_batch_size=plan["batch"], max_wait_time=plan["wait_ms"],
            env=[{"PEER_MODEL": name}],
        )  # fmt: skip
        routes[f"/{name}"] = [runtime]
    server.register_runtime(routes)
    server.run()


if __name__ == "__main__":
    main()
