"""One deployment, whose replica loads models when they are asked for."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import threading
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from comparison.peers import served

PLAN = served.plan()


class Batches:
    """The requests for one model, which Ray puts together."""

    def __init__(self, name: str, get: Any) -> None:
        self._name = name
        self._get = get

    @serve.batch(max_batch_size=PLAN["batch"], batch_wait_timeout_s=0.001)
    async def infer(self, rows: list[Any]) -> list[Any]:
        """A batch, in a thread, so that others are listened to meanwhile."""
        run = await self._get(self._name)
        batch = np.concatenate(rows) if len(rows) > 1 else rows[0]
        return list(await asyncio.get_running_loop().run_in_executor(None, run, batch))


@serve.deployment(num_replicas=1, max_ongoing_requests=64, max_queued_requests=PLAN["queued"])
class Models:
    """All models. The one replica takes every request, so their paths may say which model is asked."""

    def __init__(self) -> None:
        self._batches = {name: Batches(name, self.get) for name in served.names()}

    @serve.multiplexed(max_num_models_per_replica=PLAN["memory_models"] or len(PLAN["models"]))
    async def get(self, name: str) -> Any:
        """Load one; the one not used for longest goes when there are too many."""
        return served.load(name)

    async def __call__(self, request: Request) -> Response:
        """One request."""
        x = served.array(await request.body())
        found = await self._batches[request.url.path.strip("/")].infer(x)
        return Response(found.tobytes(), media_type="application/octet-stream")


def main() -> None:
    """Serve until told to stop."""
    # Its sockets' paths must be short.
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    ray.init(
        num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=temporary,
        object_store_memory=100 << 20, log_to_driver=False,
    )  # fmt: skip
    serve.start(
        http_options={"host": "127.0.0.1", "port": PLAN["port"], "request_timeout_s": PLAN["slo_ms"] / 1e3},
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    serve.run(
        Models.bind(),  # type: ignore[attr-defined]
        route_prefix="/",
        logging_config={"enable_access_log": False},
    )
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
    ray.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
