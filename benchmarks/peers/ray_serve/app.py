"""One deployment, whose replica loads models when they are asked for."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.peers import served

PLAN = served.plan()


@serve.deployment(num_replicas=1, max_ongoing_requests=64, max_queued_requests=PLAN["queued"])
class Models:
    """All models."""

    @serve.multiplexed(max_num_models_per_replica=PLAN["held"])
    async def get(self, name: str) -> Any:
        """Load one."""
        return served.load(name)

    @serve.batch(max_batch_size=PLAN["batch"], batch_wait_timeout_s=0.001)
    async def infer(self, rows: list[Any]) -> list[Any]:
        """A batch: Ray makes them of requests for one model."""
        import asyncio

        run = await self.get(serve.get_multiplexed_model_id())
        batch = np.concatenate(rows) if len(rows) > 1 else rows[0]
        found = await asyncio.get_running_loop().run_in_executor(None, run, batch)
        return list(found)

    async def __call__(self, request: Request) -> Response:
        """One request."""
        found = await self.infer(served.array(await request.body()))
        return Response(found.tobytes(), media_type="application/octet-stream")


def main() -> None:
    """Serve until told to stop."""
    # Its sockets' paths must be short.
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # noqa: S108 (made here, removed at the end)
    ray.init(
        num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=temporary,
        object_store_memory=100 << 20, log_to_driver=False,
    )  # fmt: skip
    serve.start(
        http_options={"host": "127.0.0.1", "port": PLAN["port"], "request_timeout_s": PLAN["slo_ms"] / 1e3},
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    serve.run(Models.bind(), route_prefix="/", logging_config={"enable_access_log": False})
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
    ray.shutdown()
    import shutil

    shutil.rmtree(temporary, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
